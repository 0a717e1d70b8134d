// A reply while it is written: text at once, Markdown as soon as the service has rendered it.

import { h, showHtml } from "./dom.js";
import { t } from "./i18n.js";
import { notice, thoughtPart, toolPart } from "./parts.js";

/** Blocks whose end is the end of the text, so that new words appear where they will stand. */
const BLOCKS = "P, UL, OL, LI, BLOCKQUOTE, PRE, H1, H2, H3, H4";

/** Shows the events of one reply. */
export class Live {
  constructor() {
    this.text = "";
    this.waiting = h("div", { class: "waiting", role: "status", "aria-label": t("writing") },
      h("i"), h("i"), h("i"));
    this.body = h("div", { class: "body" }, this.waiting);
    this.element = h("article", {
      class: "message assistant", "aria-busy": "true", "aria-label": t("assistant"),
      testid: "message", data: { role: "assistant" },
    }, this.body);
    this.begin();
    this.calls = [];
  }

  /** Start a new stretch of text: at the beginning, and after each tool. */
  begin() {
    this.thought?.end();
    this.prose = null;
    this.tail = null;
    this.thought = null;
    this.since = ""; // the text of this stretch
    this.shown = 0; // how much of it has been rendered
  }

  /** One event of the stream. */
  take(event) {
    const act = { start: this.start, thinking: this.think, text: this.write, html: this.render, call: this.call,
      result: this.result }[event.type];
    act?.call(this, event);
    this.body.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  start({ forgotten }) {
    if (forgotten) this.body.prepend(notice(t("forgotten", { n: forgotten })));
  }

  think({ text }) {
    this.thought ??= this.place(thoughtPart("", false));
    this.thought.add(text);
  }

  write({ text }) {
    this.thought?.end();
    this.thought = null;
    this.text += text;
    this.since += text;
    this.openProse();
    this.tail.textContent = this.since.slice(this.shown);
  }

  /** The HTML is of all the text that had come when the service made it: of all events before this one. */
  render({ html }) {
    this.openProse();
    this.tail.remove();
    showHtml(this.prose, html);
    this.shown = this.since.length;
    this.tail.textContent = "";
    lastBlock(this.prose).append(this.tail);
  }

  call({ name, arguments: given }) {
    this.begin();
    this.calls.push(this.place(toolPart(name, given)));
    this.body.append(this.waiting);
  }

  result({ text }) {
    this.calls.shift()?.end(text);
  }

  openProse() {
    if (this.prose) return;
    this.waiting.remove();
    this.tail = h("span", { class: "tail" });
    this.prose = h("div", { class: "prose", testid: "message-text" }, this.tail);
    this.body.append(this.prose);
  }

  place(part) {
    this.waiting.remove();
    this.body.append(part.element);
    return part;
  }

  /** No more will come. */
  end() {
    this.waiting.remove();
    this.thought?.end();
    if (!this.tail?.textContent) this.tail?.remove();
    this.element.removeAttribute("aria-busy");
  }
}

function lastBlock(element) {
  const last = element.lastElementChild;
  if (last?.matches(BLOCKS)) return lastBlock(last);
  return last?.matches("CODE") && element.matches("PRE") ? last : element;
}
