// What messages are made of, whether they are being written or stored: text, thoughts, calls of tools, notices.

import { iconButton, relabel, textButton } from "./controls.js";
import { h, showHtml } from "./dom.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";

const UNREAD = /<tool_call>([\s\S]*?)(?:<\/tool_call>|$)/g;

/** The text of a reply from the service's HTML; without HTML (the service is gone) as it is. */
export function textPart(html, plain = "") {
  const element = h("div", { class: html === undefined ? "prose plain" : "prose", testid: "message-text" });
  if (html === undefined) element.textContent = plain;
  else showFinal(element, html);
  return element;
}

/** Show the whole text of a reply that will not grow. */
export function showFinal(element, html) {
  showHtml(element, html);
  element.querySelectorAll("pre").forEach(addCopyButton);
  // Wide tables scroll by themselves, not the page.
  element.querySelectorAll(":scope > table").forEach((table) => {
    const frame = h("div", { class: "wide", tabindex: "0" });
    table.replaceWith(frame);
    frame.append(table);
  });
}

function addCopyButton(block) {
  block.tabIndex = 0; // so that a long line can be scrolled with the keyboard
  const code = block.querySelector("code") ?? block;
  const name = [...code.classList].find((one) => one.startsWith("language-"))?.slice("language-".length) ?? "";
  const frame = h("div", { class: "code" }, name && h("span", { class: "language", text: name }));
  block.replaceWith(frame);
  frame.append(block, copyButton(() => code.textContent, "copy-code", t("copy_code")));
}

/** A button that puts a text on the clipboard and says so. */
export function copyButton(text, testid, label = t("copy")) {
  const show = (picture, said) => {
    button.replaceChildren(icon(picture));
    relabel(button, said);
  };
  const button = iconButton("copy", label, testid, async () => {
    await toClipboard(text());
    show("check", t("copied"));
    setTimeout(() => show("copy", label), 1500);
  });
  return button;
}

/** The modern way needs a secure context, which a service on another machine is not without TLS. */
async function toClipboard(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = h("textarea", { value: text, class: "hidden" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A folded thought; `text` is its node, which may grow. */
export function thoughtPart(said, isOver = true) {
  const text = h("div", { class: "folded", text: said });
  const summary = h("summary", { text: isOver ? t("thought") : t("thinking") });
  const element = h("details", { class: "aside", testid: "thinking" }, summary, text);
  return { element, add: (more) => text.append(more), end: () => { summary.textContent = t("thought"); } };
}

/** A folded call of a tool; its result comes later. */
export function toolPart(name, given) {
  const state = h("span", { class: "muted", text: t("tool_runs") });
  const summary = h("summary", {}, h("span", { text: name ? t("tool_used", { name }) : t("tool_unreadable") }), state);
  const result = h("pre", { class: "result" });
  const head = (text) => h("span", { class: "label", text });
  const element = h("details", { class: "aside tool", testid: "tool-call" }, summary,
    h("div", { class: "folded" }, head(t("tool_input")), h("pre", { text: pretty(given) }), head(t("tool_result")),
      result));
  const end = (text) => {
    result.textContent = text;
    state.textContent = firstLine(text);
    element.classList.toggle("failed", text.startsWith("error: "));
  };
  return { element, end };
}

/** The calls and results of a stored reply, with what was said before each call. */
export function stepParts(steps) {
  const parts = [];
  let open = [];
  for (const step of steps) {
    if (step.role === "tool") {
      open.shift()?.end(step.content ?? "");
      continue;
    }
    const { said, unread } = apart(step.content ?? "");
    if (said) parts.push(h("div", { class: "prose plain", text: said }));
    const calls = (step.tool_calls ?? []).map((call) => toolPart(call.function.name, call.function.arguments));
    open = [...calls, ...unread.map((text) => toolPart("", text))]; // in the order of their results
    parts.push(...open.map((part) => part.element));
  }
  return parts;
}

/** What was said in a step, and the calls in it that could not be read: they stand in its text as they were written. */
function apart(content) {
  const unread = [];
  const said = content.replace(UNREAD, (whole, call) => {
    unread.push(call);
    return "";
  });
  return { said: said.trim(), unread };
}

/** Arguments on lines of their own; one argument that is text (a program, a formula) as that text. */
function pretty(given) {
  try {
    const read = typeof given === "string" ? JSON.parse(given) : given;
    const values = Object.values(read);
    return values.length === 1 && typeof values[0] === "string" ? values[0] : JSON.stringify(read, null, 2);
  } catch {
    return String(given);
  }
}

function firstLine(text) {
  const line = text.split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 60)}…` : line;
}

/** A line that explains what happened to a reply. */
export function notice(text) {
  return h("p", { class: "notice", text, testid: "notice" });
}

/** Why a conversation can't be shown, with a button that tries again. */
export function unopened(failure, run) {
  const said = failure.status === 404 ? { message: t("error_not_found") } : failure;
  return problem(said, [{ label: t("retry"), testid: "retry", run }]);
}

/** A failure, with buttons [{label, testid, run}]. */
export function problem(failure, buttons = []) {
  const made = buttons.map(({ label, testid, run }) => textButton(label, testid, run, "quiet bordered"));
  return h("div", { class: "problem", role: "alert", testid: "reply-error" },
    h("p", { text: failure.message }), ...made);
}
