// The field in which a question is written. What is in it survives a reload, an error and a change of conversation.

import { iconButton } from "./controls.js";
import { tellFailure } from "./dialog.js";
import { h, isEnter } from "./dom.js";
import { t } from "./i18n.js";

const KEPT = "nestling.draft.";

/**
 * A composer: {element, input, busy(is), open(draft), suggest(text)}.
 *
 * submit(text) sends; it may throw, then the text comes back. stop() stops what is being written. prefix: of test ids.
 */
export function composer({ submit, stop, label, prefix = "" }) {
  const named = (name) => (prefix ? `${prefix}-${name.replace("composer-", "")}` : name);
  const input = h("textarea", { rows: "1", placeholder: label, "aria-label": label, testid: named("composer-input") });
  const send = iconButton("send", t("send"), named("send"), null, { class: "round", type: "submit" });
  const halt = iconButton("stop", t("stop_key"), named("stop"), stop, { class: "round", hidden: true });
  const element = h("form", { class: "composer" }, input, send, halt);
  let draft = "";
  let isBusy = false;

  const keep = () => {
    grow(input);
    send.disabled = !input.value.trim();
    if (input.value) sessionStorage.setItem(KEPT + draft, input.value);
    else sessionStorage.removeItem(KEPT + draft);
  };
  const fill = (text) => {
    input.value = text;
    keep();
  };
  const run = async () => {
    const text = input.value.trim();
    if (!text || isBusy) return;
    fill("");
    try {
      await submit(text);
    } catch (failure) {
      if (!input.value) fill(text);
      tellFailure(failure);
    }
  };
  element.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  input.addEventListener("input", keep);
  input.addEventListener("keydown", (event) => {
    if (!isEnter(event)) return;
    event.preventDefault();
    run();
  });
  const busy = (is) => {
    isBusy = is;
    send.hidden = is;
    halt.hidden = !is;
  };
  const open = (name) => {
    draft = name;
    fill(sessionStorage.getItem(KEPT + draft) ?? "");
  };
  const suggest = (text) => {
    fill(text);
    input.focus();
  };
  open("");
  return { element, input, busy, open, suggest };
}

/** As tall as its text, within the bounds of the style sheet. */
function grow(input) {
  input.style.height = "auto";
  if (input.scrollHeight) input.style.height = `${input.scrollHeight}px`;
}
