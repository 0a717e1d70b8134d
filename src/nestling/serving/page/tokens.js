// The token view: each token of a reply in the colour of its probability; a click shows what else could stand there.

import { api } from "./api.js";
import { tellFailure } from "./dialog.js";
import { iconButton } from "./controls.js";
import { h } from "./dom.js";
import { percent } from "./format.js";
import { t } from "./i18n.js";

/** Lower bounds of the classes p4 … p1; what is less likely is p0. */
const BOUNDS = [0.9, 0.6, 0.3, 0.1];

/** The button that shows the tokens in the place of a reply's text. */
export function tokensButton(message, text) {
  let view = null;
  const button = iconButton("tokens", t("tokens"), "tokens-toggle", async () => {
    try {
      view ??= tokenView((await api(`/api/messages/${message.id}/tokens`)).data);
    } catch (failure) {
      tellFailure(failure);
      return;
    }
    const isShown = view.isConnected;
    (isShown ? view : text).replaceWith(isShown ? text : view);
    button.setAttribute("aria-pressed", String(!isShown));
  }, { "aria-pressed": "false" });
  return button;
}

function tokenView(tokens) {
  if (!tokens.length) return h("p", { class: "notice", text: t("tokens_none"), testid: "token-view" });
  const details = h("div", { class: "alternatives", "aria-live": "polite", testid: "token-alternatives" },
    h("p", { class: "muted", text: t("tokens_hint") }));
  const line = h("div", { class: "token-line", role: "group", "aria-label": t("tokens") });
  const buttons = tokens.map((token) => tokenButton(token));
  const choose = (place) => {
    buttons.forEach((one, other) => {
      one.setAttribute("aria-pressed", String(other === place));
      one.tabIndex = other === place ? 0 : -1;
    });
    details.replaceChildren(...alternatives(tokens[place]));
  };
  buttons.forEach((button, place) => {
    button.tabIndex = place ? -1 : 0; // one stop for Tab; the arrows go from token to token
    button.addEventListener("click", () => choose(place));
    line.append(button);
    if (tokens[place].text.endsWith("\n")) line.append(h("br"));
  });
  line.addEventListener("keydown", (event) => move(event, buttons, choose));
  return h("div", { class: "token-view", testid: "token-view" }, line, legend(), details);
}

function tokenButton(token) {
  return h("span", { // a button's text would not wrap like words
    class: `token ${shade(token.logprob)}`, role: "button", text: visible(token.text),
    "aria-label": `${token.text}, ${percent(token.logprob)}`, "aria-pressed": "false", testid: "token",
  });
}

function move(event, buttons, choose) {
  const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity, Enter: 0, " ": 0 }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  const place = Math.min(Math.max(buttons.indexOf(document.activeElement) + by, 0), buttons.length - 1);
  buttons[place].focus();
  choose(place);
}

/** The token and the others as bars; the token itself stands last where it was not among the likeliest. */
function alternatives(token) {
  const rows = token.top.some((one) => one.text === token.text) ? token.top : [...token.top, token];
  return rows.map((one) => {
    const bar = h("span", { class: "share" });
    bar.style.setProperty("--share", `${100 * Math.exp(one.logprob)}%`);
    const kind = one.text === token.text ? "alternative chosen" : "alternative";
    return h("div", { class: kind }, h("code", { text: visible(one.text) }), bar,
      h("span", { class: "number", text: percent(one.logprob) }));
  });
}

function legend() {
  const names = ["p4", "p3", "p2", "p1", "p0"];
  const texts = ["≥ 90 %", "≥ 60 %", "≥ 30 %", "≥ 10 %", "< 10 %"];
  const made = names.map((name, place) => h("span", { class: `token ${name}`, text: texts[place] }));
  return h("div", { class: "legend" }, ...made);
}

function shade(logprob) {
  const place = BOUNDS.findIndex((bound) => Math.exp(logprob) >= bound);
  return `p${place < 0 ? 0 : BOUNDS.length - place}`;
}

/** Spaces and line ends that can be seen. */
function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +$/, (spaces) => "·".repeat(spaces.length));
}
