// One run: its stages, the curves and samples of one of them, its settings and its report.

import { api } from "./api.js";
import { figure } from "./curves.js";
import { h } from "./dom.js";
import { decimal } from "./format.js";
import { t } from "./i18n.js";
import { figuresOf, logs } from "./logs.js";
import { problem } from "./parts.js";
import { bar, chip, every, progress, span } from "./stages.js";

const OFTEN = 2000; // milliseconds between two looks at a run that goes on, and at one that does not
const SELDOM = 10000;

/** Show a run until the function that comes back is called. */
export async function showRun(element, name) {
  const log = logs(name);
  const head = h("header", { class: "run-head" });
  const note = h("div");
  const stages = h("ol", { class: "stage-list", data: { testid: "stage-list" } });
  const learning = learningPart();
  const [settings, report] = [settingsPart(), reportPart()];
  element.append(head, note, stages, learning.element, report.element, settings.element);
  let state = "running";
  let shown = "";
  const end = every(() => (state === "running" ? OFTEN : SELDOM), async () => {
    try {
      const [run] = await Promise.all([api(`/api/runs/${encodeURIComponent(name)}`), log.load()]);
      state = run.state;
      note.replaceChildren();
      if (JSON.stringify(run) !== shown) {
        head.replaceChildren(...heading(run));
        stages.replaceChildren(...run.stages.map(stageItem));
        settings.update(run.stages);
        report.update(run.report);
      }
      shown = JSON.stringify(run);
      learning.update(run.stages, log.stages);
    } catch (failure) {
      if (!head.children.length) head.replaceChildren(back(), h("h1", { text: name }));
      note.replaceChildren(problem(failure.status === 404 ? { message: t("runs_missing") } : failure));
      if (failure.code === "runs_forbidden") end();
    }
  });
  return () => { end(); learning.end(); };
}

function back() {
  return h("a", { class: "small", href: "#/runs", text: `← ${t("runs_all")}`, data: { testid: "runs-back" } });
}

function heading(run) {
  const figures = [run.title !== run.name && run.title, run.seed !== null && t("runs_seed", { n: run.seed })].filter(Boolean);
  return [
    back(),
    h("div", { class: "beside" }, h("h1", { text: run.name }), chip(run.state)),
    run.description && h("p", { class: "muted lead", text: run.description }),
    figures.length > 0 && h("p", { class: "muted small", text: figures.join(" · ") }),
    run.error && h("p", { class: "problem", data: { testid: "run-error" }, text: run.error }),
  ].filter(Boolean);
}

function stageItem(stage) {
  const spent = stage.state === "done" && Number.isFinite(stage.seconds) ? [span(stage.seconds)] : progress(stage);
  const words = stage.state === "done" ? spent : [t(`runs_${stage.state}`), ...spent];
  return h("li", { class: "stage", data: { testid: "stage", name: stage.name, state: stage.state } },
    h("strong", { text: stage.name }), h("span", { class: "small muted", text: words.join(" · ") }),
    h("span", { class: "segment", data: { state: stage.state } }, bar(stage)));
}

// ---- curves and samples ----

/** The part that shows what one stage, chosen by the person or the latest, has logged. */
function learningPart() {
  const tabs = h("div", { class: "chips", role: "group", "aria-label": t("runs_stage") });
  const curves = h("div", { class: "curve-grid" });
  const more = h("div", { class: "curve-grid" });
  const folded = h("details", { class: "card", hidden: true }, h("summary", { text: t("runs_more_figures") }), more);
  const samples = samplesPart();
  const element = h("section", { class: "run-part", hidden: true, data: { testid: "learning" } },
    h("h2", { text: t("runs_curves") }), tabs, curves, folded, samples.element);
  const figures = new Map();
  let chosen = null;
  let last = {};

  const clear = () => {
    figures.forEach((one) => one.end());
    figures.clear();
    [curves, more].forEach((place) => place.replaceChildren());
  };
  const draw = (name) => {
    const found = figuresOf(last[name].rows);
    for (const { name: key, title, lines, isMain } of found) {
      if (!figures.has(key)) {
        figures.set(key, figure(title));
        (isMain ? curves : more).append(figures.get(key).element);
      }
      figures.get(key).update(lines);
    }
    folded.hidden = !more.children.length;
    samples.update(last[name].samples);
  };
  const choose = (name) => { chosen = name; clear(); samples.clear(); draw(name); };
  const update = (stages, logged) => {
    const names = stages.map((stage) => stage.name).filter((name) => logged[name]?.rows.length || logged[name]?.samples.length);
    element.hidden = !names.length;
    if (!names.length) return;
    const before = Object.keys(last);
    last = Object.fromEntries(names.map((name) => [name, logged[name]]));
    if (names.join() !== before.join()) {
      const next = chosen === before.at(-1) || !names.includes(chosen) ? names.at(-1) : chosen; // follow the newest stage
      tabs.replaceChildren(...names.map((name) => tab(name, name === next, choose)));
      choose(next);
      return;
    }
    draw(chosen);
  };
  return { element, update, end: clear };
}

function tab(name, isChosen, choose) {
  const data = { testid: "stage-tab", name };
  const box = h("input", { type: "radio", name: "runs-stage", value: name, checked: isChosen, data });
  box.addEventListener("change", () => choose(name));
  return h("label", { class: "chip" }, box, h("span", { text: name }));
}

/** What the model wrote while it learnt; the latest, or those of the step that was chosen. */
function samplesPart() {
  const choice = h("select", { "aria-label": t("runs_samples_of"), data: { testid: "sample-step" } });
  const texts = h("div", { class: "samples" });
  const element = h("section", { class: "run-part", hidden: true, data: { testid: "samples" } },
    h("div", { class: "beside" }, h("h2", { text: t("runs_samples") }), choice), texts);
  let rows = [];
  const show = () => {
    texts.replaceChildren(...rows.filter((row) => String(row.step) === choice.value).map(sample));
  };
  choice.addEventListener("change", show);
  return {
    element,
    clear() { rows = []; choice.replaceChildren(); element.hidden = true; },
    update(given) {
      if (given.length === rows.length) return;
      const followsLast = !rows.length || choice.selectedIndex === choice.options.length - 1;
      const before = choice.value;
      rows = [...given];
      const steps = [...new Set(rows.map((row) => String(row.step)))];
      choice.replaceChildren(...steps.map((step) => h("option", { value: step, text: t("runs_step", { n: step }) })));
      choice.value = followsLast ? steps.at(-1) : before;
      element.hidden = false;
      show();
    },
  };
}

function sample(row) {
  const said = row.text ?? row.completion ?? "";
  return h("pre", { class: "sample", data: { testid: "sample" } }, h("b", { text: asText(row.prompt) }), said);
}

/** A prompt as text: messages one below the other. */
function asText(prompt) {
  if (!Array.isArray(prompt)) return String(prompt ?? "");
  return prompt.map((message) => `${message.role}: ${message.content}\n`).join("");
}

// ---- settings and report ----

function settingsPart() {
  const list = h("div", { class: "folds" });
  const element = h("section", { class: "run-part", hidden: true }, h("h2", { text: t("runs_settings") }), list);
  return {
    element,
    update(stages) {
      element.hidden = !stages.length;
      const open = new Set([...list.querySelectorAll("details[open]")].map((one) => one.dataset.name));
      list.replaceChildren(...stages.map((stage) => {
        const fold = settingsOf(stage);
        fold.open = open.has(stage.name);
        return fold;
      }));
    },
  };
}

function settingsOf(stage) {
  const reads = Object.entries(stage.reads).map(([role, path]) => [`reads.${role}`, path]);
  const code = (text) => h("code", { text });
  const rows = [...flat(stage.settings), ...reads].map(([key, value]) => line(code(key), code(JSON.stringify(value))));
  const figures = Object.entries(stage.figures).map(([key, value]) => line(key.replaceAll("_", " "), decimal(value, 4)));
  return h("details", { class: "card", data: { testid: "settings", name: stage.name } },
    h("summary", {}, h("strong", { text: stage.name }),
      stage.kind !== stage.name && h("span", { class: "muted", text: ` ${stage.kind}` })),
    figures.length > 0 && table(t("runs_came_to"), figures), table(t("runs_settings"), rows));
}

function table(caption, rows) {
  return h("table", { class: "pairs" }, h("caption", { text: caption }), h("tbody", {}, ...rows));
}

function line(name, value) {
  return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value));
}

/** Nested settings under dotted names, as --set takes them. */
function flat(settings, prefix = "") {
  const isNested = (value) => value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length;
  return Object.entries(settings).flatMap(([key, value]) =>
    (isNested(value) ? flat(value, `${prefix}${key}.`) : [[`${prefix}${key}`, value]]));
}

/** The finished report, in a frame that can run nothing. */
function reportPart() {
  const place = h("div");
  const own = h("a", { target: "_blank", rel: "noopener", text: t("runs_report_alone") });
  const head = h("div", { class: "beside" }, h("h2", { text: t("runs_report") }), own);
  const element = h("section", { class: "run-part", hidden: true }, head, place);
  return {
    element,
    update(address) {
      element.hidden = !address;
      if (!address || own.getAttribute("href") === address) return;
      own.href = address;
      place.replaceChildren(h("iframe", {
        class: "report", sandbox: "", src: address, title: t("runs_report"), data: { testid: "report" },
      }));
    },
  };
}
