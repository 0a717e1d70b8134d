// What a stage has logged: rows of numbers and samples, fetched as they come, and the figures that can be made of them.

import { api } from "./api.js";
import { t } from "./i18n.js";

const ORDER = ["loss", "bpb", "reward", "true_reward", "pairwise_accuracy", "accuracy", "kl", "entropy", "response_tokens",
  "lr", "tokens_per_second", "grad_norm"]; // figures that are shown at once; others are folded away
const ASIDE = new Set(["step", "seconds", "eta", "tokens"]);
const JOINED = { proxy_reward: "reward", true_reward: "reward" }; // lines that belong into one figure
const EXACT = new Set(["lr", "beta"]); // set, not measured: nothing to average
const HELD_OUT = /^val_/;

/** The logs of a run: {stages: {name: {rows, samples}}, load()}, where `load` fetches what is new. */
export function logs(name) {
  const stages = {};
  let after = "";
  const load = async () => {
    for (let more = true; more;) {
      const news = await api(`/api/runs/${encodeURIComponent(name)}/metrics?after=${after}`);
      for (const [stage, told] of Object.entries(news.stages)) take(stages, stage, told);
      ({ next: after, more } = news);
    }
  };
  return { stages, load };
}

function take(stages, stage, told) {
  const kept = (stages[stage] ??= { rows: [], samples: [] });
  for (const log of ["rows", "samples"]) {
    if (told.fresh.includes(log)) kept[log] = [];
    for (const row of told[log] ?? []) kept[log].push(row);
  }
}

/** [{name, title, lines, isMain}] of all numbers in the rows. */
export function figuresOf(rows) {
  const keys = [...new Set(rows.flatMap(Object.keys))].filter((key) => !ASIDE.has(key));
  const series = keys.map((key) => [key, points(rows, key)]).filter(([, found]) => found.length > 1);
  const figures = new Map();
  for (const [key, found] of series) {
    if (key === "cross_entropy" && isSame(found, points(rows, "loss"))) continue;
    const base = key.replace(HELD_OUT, "");
    const name = JOINED[base] ?? base;
    if (!figures.has(name)) figures.set(name, []);
    const isHeldOut = HELD_OUT.test(key);
    const noisy = !isHeldOut && !EXACT.has(base) && found.length > 40;
    figures.get(name).push({ label: label(key, base, name), points: found, isHeldOut, noisy });
  }
  for (const lines of figures.values()) {
    if (lines.length === 1 && !lines[0].isHeldOut) lines[0].label = ""; // the title says it
  }
  return [...figures].map(([name, lines]) => ({ name, title: title(name), lines, isMain: ORDER.includes(name) }))
    .sort((one, other) => rank(one.name) - rank(other.name));
}

function points(rows, key) {
  return rows.filter((row) => Number.isFinite(row.step) && Number.isFinite(row[key])).map((row) => [row.step, row[key]]);
}

function isSame(one, other) {
  return one.length === other.length && one.every(([, value], place) => value === other[place][1]);
}

function rank(name) {
  const place = ORDER.indexOf(name);
  return place < 0 ? ORDER.length : place;
}

function title(name) {
  const known = t(`runs_figure_${name}`);
  return known === `runs_figure_${name}` ? name.replaceAll("_", " ") : known;
}

function label(key, base, name) {
  const kind = t(HELD_OUT.test(key) ? "runs_held_out" : "runs_training");
  return base === name ? kind : `${t(`runs_line_${base}`)} · ${kind}`;
}
