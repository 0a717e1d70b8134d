// What is served, and who is asked.

import { api } from "./api.js";
import { emit, on } from "./bus.js";
import { h } from "./dom.js";
import { short } from "./format.js";
import { t } from "./i18n.js";

const KEPT = "nestling.model";
const AUTO = "auto";
let served = [];
let isLoaded = false;
let isEmpty = false; // a service may show runs whose first model is still to come

/** Load the list of models that chat. */
export async function loadModels() {
  const found = (await api("/v1/models")).data;
  served = found.filter((model) => model.kind === "chat" || model.id === AUTO);
  isLoaded = found.length > 0;
  isEmpty = !isLoaded;
  emit("models");
}

/** Load the list where that has failed before. */
export async function needModels() {
  if (!isLoaded) await loadModels();
}

/** Models that chat; with `auto` also the router's name, where there is one. */
export function chatModels({ auto = true } = {}) {
  return served.filter((model) => auto || model.id !== AUTO);
}

/** The name to begin with: the one used last, else the first that is served. */
export function preferred() {
  const kept = localStorage.getItem(KEPT);
  return served.some((model) => model.id === kept) ? kept : served[0]?.id ?? "";
}

/** Names of the tools that the service runs. */
export function toolNames() {
  return [...new Set(served.flatMap((model) => model.tools ?? []))];
}

/** One line about who answers. */
export function introduce(name) {
  if (!isLoaded && !isEmpty) return "";
  if (!served.length) return t(isEmpty ? "error_no_model" : "no_chat_model");
  return `${name} · ${describe(name)}`;
}

function describe(name) {
  const model = served.find((one) => one.id === name);
  if (!model) return "";
  if (model.id === AUTO) return t("model_auto");
  return t("model_facts", { parameters: short(model.parameters), context: model.max_model_len });
}

/**
 * A switch between models: {element, value(), set(name)}.
 *
 * `changed(name)` is called when the person chooses.
 */
export function modelSelect({ label, testid, auto = true, changed = () => {} }) {
  const select = h("select", { class: "model", "aria-label": label, testid });
  let wanted = ""; // may be set before the models are known, and may not be served any more
  const choose = () => {
    for (const name of [wanted, preferred(), chatModels({ auto })[0]?.id]) {
      select.value = name ?? "";
      if (select.selectedIndex >= 0) break;
    }
    select.title = describe(select.value);
  };
  const fill = () => {
    select.replaceChildren(...chatModels({ auto }).map(option));
    select.hidden = !select.length; // nothing to choose from, as long as no key is given
    choose();
  };
  select.addEventListener("change", () => {
    wanted = select.value;
    select.title = describe(wanted);
    if (auto) localStorage.setItem(KEPT, wanted);
    changed(wanted);
  });
  const set = (name) => {
    wanted = name;
    choose();
  };
  fill();
  return { element: select, value: () => select.value, set, end: on("models", fill) };
}

function option(model) {
  return h("option", { value: model.id, text: model.id === AUTO ? t("model_auto_name") : model.id });
}
