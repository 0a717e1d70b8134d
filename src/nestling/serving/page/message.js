// A stored message: what was said, and what a person can do with it.

import { iconButton, textButton } from "./controls.js";
import { h, isEnter } from "./dom.js";
import { flagButton, voteButtons } from "./feedback.js";
import { decimal, duration } from "./format.js";
import { t } from "./i18n.js";
import { htmlOf } from "./markdown.js";
import { copyButton, notice, stepParts, textPart, thoughtPart } from "./parts.js";
import { tokensButton } from "./tokens.js";

const ENDINGS = { length: "ended_length", cancelled: "ended_cancelled", content_filter: "ended_filter" };

/**
 * The element of a message.
 *
 * variants: {place, count, go(place)}; acts: {edit(text), regenerate() or null, compare()}.
 */
export function messageElement(message, variants, acts) {
  return message.role === "user" ? question(message, variants, acts) : answer(message, variants, acts);
}

function question(message, variants, acts) {
  const bubble = h("div", { class: "bubble", text: message.content, testid: "message-text" });
  const bar = h("div", { class: "actions" }, copyButton(() => message.content, "copy"));
  const element = article(message, t("you"), bubble, bar);
  bar.append(iconButton("pencil", t("edit"), "edit", () => edit(element, message, acts.edit)), variantSwitch(variants) ?? "");
  return element;
}

/** The bubble becomes a field; sending it makes a branch, the old question stays. */
function edit(element, message, send) {
  const kept = [...element.childNodes];
  const back = () => {
    element.replaceChildren(...kept);
    element.querySelector("[data-testid=edit]").focus();
  };
  const label = t("edit");
  const field = h("textarea", { value: message.content, "aria-label": label, rows: "3", testid: "edit-input" });
  const submit = () => field.value.trim() && send(field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      back();
    } else if (isEnter(event)) {
      event.preventDefault();
      submit();
    }
  });
  element.replaceChildren(h("div", { class: "editor" }, field, h("div", { class: "buttons" },
    textButton(t("cancel"), "edit-cancel", back), textButton(t("send"), "edit-send", submit, "main"))));
  field.focus();
}

/** What a stored reply is made of: what was not read for it, its thought, its calls, `text`, and why it ended there. */
export function replyParts(message, text) {
  const parts = [...stepParts(message.steps), text];
  if (message.thinking) parts.unshift(thoughtPart(message.thinking).element);
  if (message.forgotten) parts.unshift(notice(t("forgotten", { n: message.forgotten })));
  const ending = ENDINGS[message.finish];
  if (ending) parts.push(notice(t(ending)));
  else if (!message.content) text.append(h("span", { class: "muted", text: t("empty_reply") }));
  return parts;
}

function answer(message, variants, acts) {
  const text = textPart(htmlOf(message), message.content);
  const body = h("div", { class: "body" }, ...replyParts(message, text));
  return article(message, t("assistant"), body, answerBar(message, text, variants, acts));
}

function answerBar(message, text, variants, acts) {
  const bar = h("div", { class: "actions" }, variantSwitch(variants), copyButton(() => message.content, "copy"));
  if (acts.regenerate) bar.append(iconButton("again", t("regenerate"), "regenerate", acts.regenerate));
  if (message.blind) {
    bar.append(textButton(t("undecided"), "undecided", acts.compare, "link"));
    return bar;
  }
  bar.append(...voteButtons(message), flagButton(message), tokensButton(message, text), facts(message));
  return bar;
}

/** Who wrote it and how fast, tools included; the rest for those who point at it. */
function facts(message) {
  const { reply } = message;
  if (!reply) return "";
  const speed = reply.seconds > 0 ? reply.completion_tokens / reply.seconds : 0;
  const more = t("reply_facts", {
    read: reply.prompt_tokens, written: reply.completion_tokens, seconds: duration(reply.seconds), seed: reply.seed,
  });
  const text = speed ? `${reply.model} · ${t("speed", { n: decimal(speed, speed < 10 ? 1 : 0) })}` : reply.model;
  return h("span", { class: "facts", title: more, text, testid: "facts" });
}

function variantSwitch({ place, count, go }) {
  if (count < 2) return null;
  const step = (name, label, by, testid) => {
    const made = iconButton(name, label, testid, () => go(place + by));
    made.disabled = place + by < 0 || place + by >= count;
    return made;
  };
  const said = t("variant_of", { n: place + 1, count });
  return h("span", { class: "variants", role: "group", "aria-label": t("variants") },
    step("left", t("variant_previous"), -1, "variant-previous"),
    h("span", { text: `${place + 1}/${count}`, "aria-label": said, testid: "variant-count" }),
    step("right", t("variant_next"), 1, "variant-next"));
}

function article(message, label, ...children) {
  return h("article", {
    class: `message ${message.role}`, "aria-label": label,
    testid: "message", data: { role: message.role, id: message.id },
  }, ...children);
}
