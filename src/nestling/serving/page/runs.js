// The view #/runs: every run of a recipe, how far it is, and at #/runs/NAME one of them as it goes on.

import { api } from "./api.js";
import { h } from "./dom.js";
import { moment } from "./format.js";
import { t } from "./i18n.js";
import { problem } from "./parts.js";
import { showRun } from "./run.js";
import { chip, every, segments, whereItIs } from "./stages.js";

/** Show the list, or the run that the address names; gives a function that ends it. */
export async function show(element) {
  element.classList.add("sheet", "runs");
  const name = decodeURIComponent(location.hash.split("/")[2] ?? "");
  return name ? showRun(element, name) : showList(element);
}

async function showList(element) {
  const list = h("ul", { class: "run-list", data: { testid: "run-list" } });
  const note = h("div");
  element.append(h("h1", { text: t("nav_runs") }), h("p", { class: "muted lead", text: t("runs_lead") }), note, list);
  let shown = "";
  const end = every(2000, async () => {
    try {
      const { data } = await api("/api/runs");
      note.replaceChildren(...(data.length ? [] : [empty()]));
      if (JSON.stringify(data) !== shown) update(list, data);
      shown = JSON.stringify(data);
    } catch (failure) {
      note.replaceChildren(problem(failure));
      if (failure.code === "runs_forbidden") end(); // asking again changes nothing
    }
  });
  return end;
}

/** Show the runs; the links stay the same elements where they can, so that the focus stays where it is. */
function update(list, runs) {
  const old = new Map([...list.children].map((item) => [item.dataset.name, item]));
  const items = runs.map((run) => {
    const item = old.get(run.name) ?? h("li", { data: { testid: "run", name: run.name } },
      h("a", { class: "run-card", href: `#/runs/${encodeURIComponent(run.name)}` }));
    item.firstChild.replaceChildren(...card(run));
    return item;
  });
  const isSame = list.children.length === items.length && items.every((item, place) => list.children[place] === item);
  if (!isSame) list.replaceChildren(...items);
}

function card(run) {
  return [
    h("div", { class: "beside" }, h("h2", { text: run.name }), chip(run.state)),
    run.description && h("p", { class: "muted small", text: run.description }),
    segments(run.stages),
    h("div", { class: "beside small muted" }, h("span", { text: whereItIs(run) }),
      h("span", { class: "when", text: moment(run.updated) })),
  ].filter(Boolean);
}

function empty() {
  return h("div", { class: "blank", data: { testid: "runs-empty" } }, h("p", { text: t("runs_empty") }),
    h("code", { text: "nestling run recipes/demo.yaml" }));
}
