// The view #/compare: one question, two replies side by side, a vote, and only then who wrote which.

import { api } from "./api.js";
import { emit, on } from "./bus.js";
import { composer } from "./composer.js";
import { tellFailure } from "./dialog.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";
import { chatModels, modelSelect, needModels } from "./models.js";
import { samplingPanel } from "./panel.js";
import { unopened } from "./parts.js";
import { Round } from "./round.js";

/** Rounds by comparison that are being written: they go on while the person looks at something else. */
const unfinished = new Map();

/** Show the comparisons of a conversation, or begin new ones for "". Returns what ends the view. */
export function show(element, id, header) {
  const compare = new Compare(element, header);
  compare.open(id);
  return () => compare.leave();
}

class Compare {
  constructor(element, header) {
    this.conversation = null;
    this.parent = null; // the reply from which the first comparison goes on
    this.rounds = [];
    const choice = (place) =>
      modelSelect({ label: t("compare_model", { n: place + 1 }), testid: `compare-model-${place}`, auto: false });
    this.choices = [choice(0), choice(1)];
    this.panel = samplingPanel({ changed: ({ system, sampling, tools }) => this.change({ system, sampling, tools }) });
    const fresh = h("a", { class: "button quiet", href: "#/compare", title: t("compare_new"), testid: "compare-new" },
      icon("plus"), h("span", { class: "wide-only", text: t("compare_new") }));
    fresh.addEventListener("click", () => { if (location.hash === "#/compare") this.open(""); });
    const against = h("span", { class: "muted wide-only", text: t("compare_against") });
    header.append(this.choices[0].element, against, this.choices[1].element, h("span", { class: "grow" }), fresh,
      this.panel.toggle);
    const submit = (text) => this.ask(text);
    this.composer = composer({ label: t("compare_ask"), prefix: "compare", submit, stop: () => this.stop() });
    this.thread = h("div", { class: "thread broad" });
    this.scroller = h("div", { class: "scroll" }, this.thread);
    const print = h("p", { class: "fine", text: t("compare_print") });
    const foot = h("div", { class: "foot" }, this.composer.element, print);
    element.classList.add("chat");
    element.append(h("div", { class: "column" }, this.scroller, foot), this.panel.element);
    const escape = (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    };
    document.addEventListener("keydown", escape);
    this.ends = [() => document.removeEventListener("keydown", escape), ...this.choices.map((one) => one.end),
      on("models", () => { this.panel.open(this.conversation); this.spread(); })];
    this.spread();
  }

  leave() {
    this.ends.forEach((end) => end());
  }

  /** Where there are several models, begin with two different ones. */
  spread() {
    const [first, second] = chatModels({ auto: false });
    if (!first || this.rounds.length) return;
    this.choices[0].set(first.id);
    this.choices[1].set((second ?? first).id);
  }

  async open(id) {
    this.composer.open(`compare.${id}`);
    this.rounds = [];
    this.conversation = null;
    this.parent = null;
    this.panel.open(null);
    this.opened = this.load(id);
    try {
      await this.opened;
    } catch (failure) {
      this.thread.replaceChildren(unopened(failure, () => this.open(id)));
    }
  }

  async load(id) {
    if (id) await this.take(await api(`/api/conversations/${id}`));
    this.draw();
  }

  /** Comparisons as the service has them. */
  async take({ messages, comparisons, ...conversation }) {
    this.conversation = conversation;
    this.panel.open(conversation);
    const known = new Map(messages.map((one) => [one.id, one]));
    const tip = known.get(conversation.tip);
    this.parent = tip?.role === "assistant" && !tip.blind ? tip.id : null;
    this.rounds = comparisons.map((one) => this.round(one, known.get(one.parent), known));
    await Promise.all(this.rounds.map((round) => (round.isWriting ? null : round.load())));
  }

  round(comparison, question, known = new Map()) {
    const round = unfinished.get(comparison.id) ?? new Round({ comparison, question, known });
    round.changed = () => this.note();
    round.grown = () => this.follow();
    return round;
  }

  draw() {
    emit("here", { id: this.conversation?.id ?? null });
    const parts = this.rounds.length ? this.rounds.map((one) => one.element) : [this.introduction()];
    this.thread.replaceChildren(...parts);
    this.note();
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  introduction() {
    return h("div", { class: "welcome", testid: "empty" }, h("h1", { text: t("compare_title") }),
      h("p", { class: "muted", text: t("compare_lead") }));
  }

  /** What the composer may do now: ask when everything is decided, stop while something is written. */
  note() {
    const writes = this.rounds.some((one) => one.isWriting);
    this.composer.busy(writes);
    this.composer.input.disabled = this.waits && !writes;
    this.composer.input.placeholder = this.waits && !writes ? t("compare_vote_first") : t("compare_ask");
    this.choices.forEach((one) => { one.element.disabled = writes; });
  }

  /** Whether a vote is due. */
  get waits() {
    return this.rounds.some((one) => !one.comparison.choice);
  }

  /** Have a question answered twice; one that comes too early waits for the conversation. */
  async ask(text) {
    await this.opened;
    if (this.waits) throw new Error(t("compare_vote_first"));
    await this.panel.flush();
    await this.ensure();
    const path = `/api/conversations/${this.conversation.id}`;
    const parent = this.rounds.at(-1)?.chosen ?? this.parent;
    const question = await api(`${path}/messages`, { method: "POST", body: { content: text, parent } });
    const candidates = this.choices.map((one) => ({ model: one.value(), sampling: this.sampling() }));
    const comparison = await api(`${path}/comparisons`, { method: "POST", body: { parent: question.id, candidates } });
    const round = this.round(comparison, question);
    this.rounds.push(round);
    this.draw();
    emit("conversations");
    unfinished.set(comparison.id, round);
    round.write().finally(() => unfinished.delete(comparison.id));
    this.note();
  }

  /** Without the seed: two samples of one model would be the same. */
  sampling() {
    const { seed, ...sampling } = this.panel.settings().sampling;
    return sampling;
  }

  async ensure() {
    if (this.conversation) return;
    await needModels();
    const { system, sampling, tools } = this.panel.settings();
    const body = { system, sampling, tools, model: this.choices[0].value() };
    this.conversation = await api("/api/conversations", { method: "POST", body });
    history.replaceState(null, "", `#/compare/${this.conversation.id}`);
    this.composer.open(`compare.${this.conversation.id}`);
  }

  async change(changes) {
    if (!this.conversation) return;
    await api(`/api/conversations/${this.conversation.id}`, { method: "PATCH", body: changes }).catch(tellFailure);
  }

  stop() {
    this.rounds.forEach((one) => one.stop());
  }

  follow() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    if (scrollHeight - scrollTop - clientHeight < 120) this.scroller.scrollTop = scrollHeight;
  }
}
