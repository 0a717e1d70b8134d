// How replies are made: the system prompt, the parameters of sampling, tools, thinking. A conversation keeps its own.

import { iconButton, textButton } from "./controls.js";
import { h } from "./dom.js";
import { decimal } from "./format.js";
import { t } from "./i18n.js";
import { toolNames } from "./models.js";

const KEPT = "nestling.panel";
/** What the service does where nothing is said (routes/_replying.py). */
const SLIDERS = {
  temperature: { min: 0, max: 2, step: 0.05, usual: 0.7 },
  top_p: { min: 0, max: 1, step: 0.01, usual: 0.9 },
  min_p: { min: 0, max: 1, step: 0.01, usual: 0 },
  presence_penalty: { min: -2, max: 2, step: 0.1, usual: 0 },
  frequency_penalty: { min: -2, max: 2, step: 0.1, usual: 0 },
  repetition_penalty: { min: 0.5, max: 2, step: 0.05, usual: 1 },
};
const NUMBERS = {
  top_k: { min: 0, hint: "off" },
  max_tokens: { min: 1, hint: "as_fits" },
  seed: { min: 0, max: Number.MAX_SAFE_INTEGER, hint: "random" },
};
const ORDER = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty",
  "presence_penalty", "frequency_penalty"];
const EFFORTS = ["", "none", "low", "medium", "high"];
const WAIT = 400;

/** Nothing said. `tools` null means all that there are. */
function plain() {
  return { system: "", sampling: {}, tools: null, effort: "" };
}

/** Settings as a new conversation begins with them: those used last. */
function kept() {
  try {
    return { ...plain(), ...JSON.parse(localStorage.getItem(KEPT)) };
  } catch {
    return plain();
  }
}

/**
 * The panel: {element, toggle, settings(), open(conversation or null), flush()}.
 *
 * `changed(settings)` follows the person a little later; flush() waits until it knows everything.
 */
export function samplingPanel({ changed }) {
  let settings = kept();
  const body = h("div", { class: "panel-body" });
  const close = iconButton("close", t("close"), "panel-close", () => flip(false));
  const reset = textButton(t("reset"), "panel-reset", () => { change(plain()); draw(); }, "quiet bordered");
  const element = h("aside", { class: "panel", hidden: true, "aria-label": t("panel"), testid: "panel" },
    h("header", {}, h("h2", { text: t("panel") }), close), body, h("footer", {}, reset));
  const act = () => flip(element.hidden);
  const toggle = iconButton("sliders", t("panel"), "panel-toggle", act, { "aria-expanded": "false" });

  let timer = 0;
  const current = () => ({ ...settings, tools: chosenTools(settings) });
  const flush = async () => {
    if (!timer) return;
    clearTimeout(timer);
    timer = 0;
    await changed(current());
  };
  const change = (part) => {
    settings = { ...settings, ...part };
    localStorage.setItem(KEPT, JSON.stringify(settings));
    mark();
    clearTimeout(timer);
    timer = setTimeout(flush, WAIT);
  };
  const mark = () => {
    const lacksTools = chosenTools(settings).length < toolNames().length;
    const differs = settings.system || settings.effort || lacksTools || Object.keys(settings.sampling).length;
    toggle.classList.toggle("marked", Boolean(differs));
  };
  const draw = () => {
    body.replaceChildren(...fields(settings, change));
    mark();
  };
  const flip = (show) => {
    element.hidden = !show;
    toggle.setAttribute("aria-expanded", String(show));
    (show ? close : toggle).focus();
  };
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    flip(false);
  });
  const open = (conversation) => {
    const { system, sampling, tools } = conversation ?? kept();
    settings = { ...settings, system, sampling, tools };
    draw();
  };
  draw();
  return { element, toggle, settings: current, open, flush };
}

/** Tools that are on, of those that the service has now. */
function chosenTools({ tools }) {
  return toolNames().filter((name) => tools === null || tools.includes(name));
}

function fields(settings, change) {
  const sampling = { ...settings.sampling };
  const set = (name, value) => {
    if (value === null) delete sampling[name];
    else sampling[name] = value;
    change({ sampling: { ...sampling } });
  };
  const note = (event) => change({ system: event.target.value });
  const system = h("textarea", {
    rows: "4", value: settings.system, placeholder: t("system_hint"), testid: "field-system", on: { input: note },
  });
  const made = [h("label", { class: "stack" }, h("span", { text: t("system") }), system)];
  for (const name of ORDER) made.push((name in SLIDERS ? slider : number)(name, sampling[name], set));
  return [...made, effort(settings, change), ...tools(settings, change)];
}

function slider(name, value, set) {
  const { usual, ...bounds } = SLIDERS[name];
  const shown = h("output", { text: decimal(value ?? usual, 2) });
  const input = h("input", { type: "range", ...bounds, testid: `field-${name}` });
  input.value = value ?? usual;
  input.addEventListener("input", () => {
    const chosen = Number(input.value);
    shown.textContent = decimal(chosen, 2);
    set(name, chosen === usual ? null : chosen);
  });
  return h("label", { class: "stack", title: t(`hint_${name}`) },
    h("span", { class: "between" }, h("span", { text: t(name) }), shown), input);
}

function number(name, value, set) {
  const { hint, ...bounds } = NUMBERS[name];
  const input = h("input", { type: "number", ...bounds, step: 1, placeholder: t(hint), testid: `field-${name}` });
  input.value = value ?? "";
  input.addEventListener("input", () => {
    if (input.validity.valid) set(name, input.value === "" ? null : Number(input.value));
  });
  return h("label", { class: "beside", title: t(`hint_${name}`) }, h("span", { text: t(name) }), input);
}

function effort(settings, change) {
  const select = h("select", { testid: "field-effort" },
    ...EFFORTS.map((one) => h("option", { value: one, text: t(`effort_${one || "free"}`) })));
  select.value = settings.effort;
  select.addEventListener("change", () => change({ effort: select.value }));
  return h("label", { class: "beside", title: t("hint_effort") }, h("span", { text: t("effort") }), select);
}

function tools(settings, change) {
  const names = toolNames();
  if (!names.length) return [h("p", { class: "muted small", text: t("no_tools") })];
  const boxes = names.map((name) => h("input", {
    type: "checkbox", value: name, checked: chosenTools(settings).includes(name), testid: `tool-${name}`,
  }));
  const note = () => change({ tools: boxes.filter((box) => box.checked).map((box) => box.value) });
  boxes.forEach((box) => box.addEventListener("change", note));
  return [h("fieldset", {}, h("legend", { text: t("tools") }),
    ...boxes.map((box) => h("label", { class: "check" }, box, h("span", { text: box.value }))))];
}
