// What an empty conversation shows: who answers, and a few things to try.

import { textButton } from "./controls.js";
import { h, svg } from "./dom.js";
import { t } from "./i18n.js";
import { introduce } from "./models.js";

const IDEAS = ["idea_story", "idea_who", "idea_sum", "idea_code"];

/** `choose(text)` is called with an idea that was clicked. */
export function welcome(model, choose) {
  const ideas = IDEAS.map((key) => textButton(t(key), "idea", () => choose(t(key)), "idea"));
  return h("div", { class: "welcome", testid: "empty" }, egg(), h("h1", { text: t("welcome") }),
    h("p", { class: "muted", text: introduce(model) }), h("div", { class: "ideas" }, ...ideas));
}

/** The mark of the project. */
export function egg() {
  return svg("svg", { class: "egg", viewBox: "0 0 32 32", "aria-hidden": "true" },
    svg("path", { class: "shell", d: "M16 3c-5.5 0-10 8-10 15a10 10 0 0 0 20 0c0-7-4.5-15-10-15z" }),
    ...[[12.5, 13, 1.3], [18.5, 10, 1], [20, 17, 1.5], [13.5, 20.5, 1], [17.5, 23.5, 1.2]].map(
      ([cx, cy, r]) => svg("circle", { class: "spot", cx, cy, r })));
}
