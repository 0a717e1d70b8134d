// Dialogs and short notices. The browser's own <dialog> keeps the focus inside and closes on Esc.

import { textButton } from "./controls.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";

/**
 * Show a dialog; true when it is left with its main button.
 *
 * content: elements between title and buttons; danger: the main button destroys something.
 */
export function ask({ title, content = [], ok, danger = false }) {
  const heading = h("h2", { text: title, id: `dialog-${Date.now()}` });
  const cancel = textButton(t("cancel"), "dialog-cancel", () => dialog.close());
  const main = h("button", { class: danger ? "danger" : "main", text: ok, testid: "dialog-ok" });
  const form = h("form", { method: "dialog" }, heading, ...content, h("div", { class: "buttons" }, cancel, main));
  const dialog = h("dialog", { "aria-labelledby": heading.id, testid: "dialog" }, form);
  return new Promise((resolve) => {
    let said = false;
    form.addEventListener("submit", () => { said = true; });
    dialog.addEventListener("close", () => { dialog.remove(); resolve(said); });
    document.body.append(dialog);
    dialog.showModal();
    (dialog.querySelector("input:not([type=radio]), textarea") ?? main).focus();
  });
}

/** A line at the bottom that goes by itself. */
export function toast(text) {
  document.querySelector(".toast")?.remove();
  const element = h("div", { class: "toast", role: "status", testid: "toast" }, h("span", { text }));
  document.body.append(element);
  setTimeout(() => element.remove(), 5000);
}

/** Tell a failure as a notice. */
export function tellFailure(failure) {
  toast(failure.message);
}

/** One of several, as a row of chips: {element, value()}; value is "" where none is chosen. */
export function chips(name, options, label, chosen = "") {
  const inputs = options.map(({ value, text }) => {
    const input = h("input", { type: "radio", name, value, checked: value === chosen, testid: `reason-${value}` });
    // A second click takes the choice back: no reason has to be given.
    input.addEventListener("click", () => {
      if (input.dataset.was === "yes") input.checked = false;
      inputs.forEach((one) => { one.dataset.was = one.checked ? "yes" : ""; });
    });
    input.dataset.was = value === chosen ? "yes" : "";
    input.labelText = text;
    return input;
  });
  const element = h("div", { class: "chips", role: "radiogroup", "aria-label": label },
    ...inputs.map((input) => h("label", { class: "chip" }, input, h("span", { text: input.labelText }))));
  return { element, value: () => inputs.find((input) => input.checked)?.value ?? "" };
}
