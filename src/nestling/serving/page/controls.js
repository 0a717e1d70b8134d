// The buttons of the page.

import { h } from "./dom.js";
import { icon } from "./icons.js";

/** A picture with a label for those who don't see it or don't know it; `more` are further attributes. */
export function iconButton(picture, label, testid, act, more = {}) {
  const attributes = { class: "quiet icon-only", type: "button", "aria-label": label, title: label, testid };
  return h("button", { ...attributes, on: { click: act }, ...more }, icon(picture));
}

/** Words to press; `kind` is one of the classes of base.css. */
export function textButton(label, testid, act, kind = "quiet") {
  return h("button", { class: kind, type: "button", text: label, testid, on: { click: act } });
}

/** Another label for a button made above. */
export function relabel(button, label) {
  button.title = label;
  button.setAttribute("aria-label", label);
}
