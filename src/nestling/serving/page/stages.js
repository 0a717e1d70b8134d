// Parts of the views of runs: states, progress, and asking again while somebody looks.

import { h } from "./dom.js";
import { decimal } from "./format.js";
import { t } from "./i18n.js";

/** Do something now and every so many milliseconds (a number or a function), only while the page is seen; gives the end. */
export function every(wait, work) {
  let timer = 0;
  let isOver = false;
  let isBusy = false;
  const turn = async () => {
    clearTimeout(timer);
    if (isOver || isBusy || document.hidden) return;
    isBusy = true;
    await work();
    isBusy = false;
    if (!isOver) timer = setTimeout(turn, typeof wait === "function" ? wait() : wait);
  };
  document.addEventListener("visibilitychange", turn);
  turn();
  return () => {
    isOver = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", turn);
  };
}

/** A state in words and colour. */
export function chip(state) {
  return h("span", { class: "state", data: { testid: "run-state", state }, text: t(`runs_${state}`) });
}

/** The stages of a run as one bar, each a part of it. */
export function segments(stages) {
  const done = stages.filter((stage) => stage.state === "done").length;
  const parts = stages.map((stage) => h("span", { class: "segment", data: { state: stage.state } }, bar(stage)));
  return h("div", { class: "segments", role: "img", "aria-label": t("runs_stages_done", { done, all: stages.length }) }, ...parts);
}

/** How much of a stage is done, as far as it tells. */
export function bar(stage) {
  const fill = h("i");
  fill.style.width = `${100 * (stage.state === "done" ? 1 : share(stage))}%`;
  return fill;
}

function share({ seconds, eta }) {
  return Number.isFinite(seconds) && Number.isFinite(eta) && seconds + eta > 0 ? seconds / (seconds + eta) : 0;
}

/** One line: which stage is at work, or how many were done. */
export function whereItIs(run) {
  const stage = run.stages.find((one) => ["running", "failed", "stopped"].includes(one.state));
  if (stage) return [stage.name, ...progress(stage)].join(" · ");
  const done = run.stages.filter((one) => one.state === "done").length;
  return t("runs_stages_done", { done, all: run.stages.length });
}

/** Step and time left of a stage that tells them. */
export function progress(stage) {
  const told = [];
  if (Number.isFinite(stage.step)) told.push(t("runs_step", { n: decimal(stage.step) }));
  if (stage.state === "running" && Number.isFinite(stage.eta)) told.push(t("runs_left", { time: span(stage.eta) }));
  return told;
}

/** A length of time: 8 s, 12 min, 3 h 20 min. */
export function span(seconds) {
  if (seconds < 60) return t("runs_seconds", { n: decimal(Math.max(seconds, 0), seconds < 10 ? 1 : 0) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return t("runs_minutes", { n: minutes });
  return t("runs_hours", { h: Math.floor(minutes / 60), min: minutes % 60 });
}
