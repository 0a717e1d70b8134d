// The view #/arena: who won the blind comparisons, rated by Bradley and Terry, with intervals.

import { api } from "./api.js";
import { h } from "./dom.js";
import { decimal } from "./format.js";
import { t } from "./i18n.js";
import { problem } from "./parts.js";

/** Show the table. */
export async function show(element) {
  element.classList.add("sheet");
  element.append(h("h1", { text: t("arena") }), h("p", { class: "muted lead", text: t("arena_lead") }));
  try {
    const table = await api("/api/arena");
    element.append(counts(table), table.data.length ? standings(table.data) : empty());
  } catch (failure) {
    element.append(problem(failure));
  }
}

function counts({ votes, undecided, same_model: same, both_bad: bad }) {
  const figure = (value, label) =>
    h("div", { class: "figure" }, h("strong", { text: decimal(value) }), h("span", { text: label }));
  return h("div", { class: "figures", testid: "arena-votes" }, figure(votes, t("arena_votes")),
    figure(undecided, t("arena_undecided")), figure(same, t("arena_same")), figure(bad, t("arena_bad")));
}

function empty() {
  return h("div", { class: "blank", testid: "arena-empty" }, h("p", { text: t("arena_empty") }),
    h("a", { class: "button main", href: "#/compare", text: t("arena_begin") }));
}

function standings(rows) {
  const low = Math.min(...rows.map((row) => row.low));
  const high = Math.max(...rows.map((row) => row.high));
  const place = (rating) => `${(100 * (rating - low)) / Math.max(high - low, 1)}%`;
  const names = ["rank", "model", "rating", "interval", "games", "wins", "ties", "losses"];
  const heads = names.map((name) => h("th", { scope: "col", role: "columnheader", class: name, text: t(`arena_${name}`) }));
  // The roles are those of the elements, which lose them where a narrow screen lays rows out as cards.
  return h("table", { class: "standings", role: "table", testid: "arena-table" },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...heads)),
    h("tbody", { role: "rowgroup" }, ...rows.map((row, index) => standing(row, index + 1, place))));
}

function standing(row, rank, place) {
  const between = `${decimal(row.low)} – ${decimal(row.high)}`;
  const bar = h("span", { class: "interval", title: between }, h("i"), h("b"));
  bar.style.setProperty("--low", place(row.low));
  bar.style.setProperty("--high", place(row.high));
  bar.style.setProperty("--at", place(row.rating));
  const cell = (name, ...children) =>
    h("td", { role: "cell", class: `number ${name}`, data: { label: t(`arena_${name}`) } }, ...children);
  const range = h("span", { class: "range", data: { label: t("arena_interval") }, text: between });
  return h("tr", { role: "row", testid: "arena-row", data: { model: row.model } }, cell("rank", decimal(rank)),
    h("th", { scope: "row", role: "rowheader", text: row.model }), cell("rating", decimal(row.rating)),
    cell("interval", bar, range),
    ...["games", "wins", "ties", "losses"].map((name) => cell(name, decimal(row[name]))));
}
