// The view #/chat: one conversation, its path of messages, and what happens to it.

import { api } from "./api.js";
import { emit, on } from "./bus.js";
import { composer } from "./composer.js";
import { iconButton } from "./controls.js";
import { tellFailure } from "./dialog.js";
import { h, showChildren } from "./dom.js";
import { t } from "./i18n.js";
import { htmlOf, keepHtml, renderAll } from "./markdown.js";
import { messageElement } from "./message.js";
import { modelSelect, needModels } from "./models.js";
import { samplingPanel } from "./panel.js";
import { problem, unopened } from "./parts.js";
import { areRanked, rankQuestion } from "./ranking.js";
import { beginReply, runningIn, stopReply } from "./replies.js";
import { childrenOf, leafBelow, pathTo, variantsOf } from "./tree.js";
import { welcome } from "./welcome.js";

const NEAR = 90; // pixels from the end at which the view still follows a growing reply

/** Show a conversation, or a new one for "". Returns what ends the view. */
export function show(element, id, header) {
  const chat = new Chat(element, header);
  chat.open(id);
  return () => chat.leave();
}

class Chat {
  constructor(element, header) {
    this.messages = new Map();
    this.rankings = [];
    this.elements = new Map(); // of messages by id: what is unfolded stays so while the thread is drawn again
    this.failed = null; // {parent, live, failure} of the last reply that failed
    const chosen = (model) => this.change({ model });
    this.models = modelSelect({ label: t("model"), testid: "model-select", changed: chosen });
    this.panel = samplingPanel({ changed: ({ system, sampling, tools }) => this.change({ system, sampling, tools }) });
    header.append(this.models.element, h("span", { class: "grow" }), this.panel.toggle);
    this.composer = composer({ label: t("ask"), submit: (text) => this.send(text), stop: () => this.stop() });
    const log = { role: "log", "aria-live": "off", "aria-label": t("conversation") };
    this.thread = h("div", { class: "thread", ...log, testid: "thread" });
    // The thread is drawn anew as it changes; what is new is told here instead.
    this.announcer = h("div", { class: "hidden", role: "status", "aria-live": "polite", testid: "announcer" });
    this.scroller = h("div", { class: "scroll", tabindex: "-1" }, this.thread);
    const round = { class: "round jump", hidden: true };
    this.jump = iconButton("below", t("to_end"), "jump", () => this.toEnd(), round);
    const print = h("p", { class: "fine", text: t("fine_print") });
    const foot = h("div", { class: "foot" }, this.jump, this.composer.element, print);
    element.classList.add("chat");
    element.append(h("div", { class: "column" }, this.scroller, foot, this.announcer), this.panel.element);
    this.listen();
  }

  listen() {
    this.scroller.addEventListener("scroll", () => this.noteScroll());
    this.thread.addEventListener("grown", () => this.follow());
    const escape = (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    };
    document.addEventListener("keydown", escape);
    this.ends = [on("reply", (ended) => this.ended(ended)), this.models.end,
      on("models", () => { this.panel.open(this.conversation); if (!this.messages.size) this.draw(); }),
      () => document.removeEventListener("keydown", escape)];
  }

  leave() {
    this.ends.forEach((end) => end());
  }

  get id() {
    return this.conversation?.id;
  }

  async open(id) {
    this.composer.open(id);
    this.opened = this.load(id);
    try {
      await this.opened;
      emit("here", { id: id || null });
    } catch (failure) {
      this.thread.replaceChildren(unopened(failure, () => this.open(id)));
      return;
    }
    if (matchMedia("(hover: hover)").matches) this.composer.input.focus();
  }

  async load(id) {
    if (id) await this.take(await api(`/api/conversations/${id}`));
    else await this.draw();
  }

  /** A whole conversation of the service's. */
  take({ messages, rankings, ...conversation }) {
    this.conversation = conversation;
    this.rankings = rankings;
    document.title = `${conversation.title || t("untitled")} · Nestling`;
    this.messages = new Map(messages.map((one) => [one.id, one]));
    this.models.set(conversation.model);
    this.panel.open(conversation);
    return this.draw({ end: true });
  }

  /** Change what the conversation is answered with; before there is one, it is only shown. */
  async change(changes) {
    if (!this.conversation) return;
    try {
      const told = await api(`/api/conversations/${this.id}`, { method: "PATCH", body: changes });
      Object.assign(this.conversation, told, { tip: this.conversation.tip }); // what is looked at is known here first
    } catch (failure) {
      tellFailure(failure);
    }
  }

  async ensure() {
    if (this.conversation) return;
    await needModels();
    const { system, sampling, tools } = this.panel.settings();
    const body = { system, sampling, tools, model: this.models.value() };
    this.conversation = await api("/api/conversations", { method: "POST", body });
    history.replaceState(null, "", `#/chat/${this.id}`);
    this.composer.open(this.id);
    emit("here", { id: this.id });
  }

  get path() {
    return pathTo(this.messages, this.conversation?.tip);
  }

  /** Send a question after the reply that is shown last; one that comes too early waits for the conversation. */
  async send(text) {
    await this.opened;
    const last = this.path.at(-1);
    await this.ask(text, last?.role === "user" ? last.parent : last?.id ?? null);
  }

  /** Put a question in a place of the tree and have it answered. */
  async ask(text, parent) {
    if (runningIn(this.id)) return;
    await this.ensure();
    const path = `/api/conversations/${this.id}/messages`;
    this.add(await api(path, { method: "POST", body: { content: text, parent } }));
    emit("conversations");
    this.answer(this.conversation.tip);
  }

  add(message) {
    this.messages.set(message.id, message);
    this.conversation.tip = message.id;
  }

  /** Have a question answered, once more if it has replies. */
  async answer(parent) {
    if (runningIn(this.id)) return;
    await this.panel.flush();
    this.failed = null;
    this.conversation.tip = parent;
    const { effort, tools } = this.panel.settings();
    const body = { model: this.models.value(), tools, ...(effort && { reasoning_effort: effort }) };
    beginReply(this.id, parent, body, childrenOf(this.messages, parent).map((one) => one.id));
    this.announcer.textContent = t("writing");
    this.draw({ end: true });
  }

  stop() {
    if (this.id) stopReply(this.id);
  }

  /** A reply has ended, of this conversation or another. */
  ended({ conversation, parent, message, html, failure, live }) {
    if (conversation !== this.id) return;
    if (failure) this.failed = { parent, live, failure };
    if (message) {
      keepHtml(message, html);
      this.add(message);
    }
    this.announcer.textContent = message?.content ?? failure?.message ?? "";
    this.draw();
  }

  /** Look at another variant; the service is told, so that the conversation opens there next time. */
  async lookAt(message, place) {
    const to = variantsOf(this.messages, message)[place];
    const isLater = place > variantsOf(this.messages, message).indexOf(message);
    const testid = isLater ? "variant-next" : "variant-previous";
    this.conversation.tip = leafBelow(this.messages, to.id);
    this.failed = null;
    await this.draw();
    this.elements.get(to.id).element.querySelector(`[data-testid=${testid}]:enabled`)?.focus();
    this.change({ tip: this.conversation.tip });
  }

  async draw({ end = false } = {}) {
    const reply = runningIn(this.id);
    this.composer.busy(Boolean(reply));
    const path = this.path;
    const drawing = Symbol("drawing");
    this.drawing = drawing;
    await renderAll(path);
    if (this.drawing !== drawing) return; // a later call has overtaken this one
    const follows = end || this.isNearEnd();
    const last = path.at(-1);
    const parts = path.map((message) => this.element(message));
    parts.forEach((one, place) => one.classList.toggle("last", place === parts.length - 1));
    parts.push(...this.below(last, reply));
    this.thread.classList.toggle("busy", Boolean(reply));
    showChildren(this.thread, parts);
    if (follows) this.toEnd();
  }

  /** What stands below the last message of the path. */
  below(last, reply) {
    if (!last) return [welcome(this.models.value(), (text) => this.composer.suggest(text))];
    if (reply) return reply.parent === last.id ? [reply.live.element] : [];
    return last.role === "user" ? [this.unanswered(last)] : this.rank(last);
  }

  /** After another reply was asked for: is it better than the one before? */
  rank(message) {
    const variants = variantsOf(this.messages, message);
    const before = variants[variants.indexOf(message) - 1];
    if (!before || before.blind || message.blind || areRanked(this.rankings, message, before)) return [];
    return [rankQuestion(this.id, message, before, (ranking) => this.rankings.push(ranking))];
  }

  /** The element of a message; made anew only where it would look different. */
  element(message) {
    const variants = variantsOf(this.messages, message);
    const place = variants.indexOf(message);
    const looks = [place, variants.length, message.blind, htmlOf(message) === undefined].join();
    const kept = this.elements.get(message.id);
    if (kept?.looks === looks) return kept.element;
    const go = (to) => this.lookAt(message, to);
    const element = messageElement(message, { place, count: variants.length, go }, {
      compare: () => { location.hash = `#/compare/${this.id}`; },
      edit: (text) => this.ask(text, message.parent).catch(tellFailure),
      regenerate: message.blind ? null : () => this.answer(message.parent),
    });
    this.elements.set(message.id, { looks, element });
    return element;
  }

  /** What stands below a question without a reply: why, and how to get one; or the comparison that waits for a vote. */
  unanswered(question) {
    if (childrenOf(this.messages, question.id).some((one) => one.blind)) {
      const link = h("a", { href: `#/compare/${this.id}`, text: t("undecided") });
      return h("p", { class: "notice" }, t("compare_waits"), " ", link);
    }
    const retry = { label: t("retry"), testid: "retry", run: () => this.answer(question.id) };
    const { failure, live } = this.failed?.parent === question.id ? this.failed : {};
    const said = problem(failure ?? { message: t("no_reply") }, [retry]);
    return live?.text ? h("div", { class: "body" }, live.element, said) : said;
  }

  isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  noteScroll() {
    this.follows = this.isNearEnd();
    this.jump.hidden = this.follows;
  }

  follow() {
    if (this.follows !== false) this.toEnd();
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.noteScroll();
  }
}
