// One blind comparison: a question, the replies A and B as they are written, the vote, and who was who.

import { api, stream } from "./api.js";
import { emit } from "./bus.js";
import { textButton } from "./controls.js";
import { tellFailure } from "./dialog.js";
import { h } from "./dom.js";
import { t } from "./i18n.js";
import { Live } from "./live.js";
import { htmlOf, keepHtml, renderAll } from "./markdown.js";
import { replyParts } from "./message.js";
import { problem, textPart } from "./parts.js";

const SIDES = ["a", "b"];
const CHOICES = ["a", "b", "tie", "both_bad"];
const STORED = { tries: 20, wait: 150 };

/**
 * comparison and question as stored, known messages by id.
 *
 * The view that shows it is told by changed() when its state has changed, by grown() when its text has.
 */
export class Round {
  constructor({ comparison, question, known }) {
    this.comparison = comparison;
    this.changed = () => {};
    this.grown = () => {};
    this.messages = { a: known.get(comparison.a), b: known.get(comparison.b) };
    this.writing = {}; // side -> AbortController
    this.columns = Object.fromEntries(SIDES.map((side) => [side, this.column(side)]));
    this.verdict = h("div", { class: "verdict" });
    const bubble = h("div", { class: "bubble", text: question?.content ?? "" });
    const sides = h("div", { class: "sides" }, ...SIDES.map((side) => this.columns[side].element));
    this.element = h("section", { class: "round-of", "aria-label": t("compare_round"), testid: "compare-round" },
      h("div", { class: "message user" }, bubble), sides, this.verdict);
  }

  column(side) {
    const name = h("h3", { text: t(`side_${side}`) });
    const body = h("div", { class: "side-body" });
    const label = t(`side_${side}`);
    const element = h("article", { class: "side", "aria-label": label, testid: `side-${side}` }, name, body);
    return { element, name, body };
  }

  get isWriting() {
    return Object.keys(this.writing).length > 0;
  }

  /** The reply from which the conversation goes on. */
  get chosen() {
    return this.comparison.choice === "b" ? this.comparison.b : this.comparison.a;
  }

  /** Show what is stored. */
  async load() {
    await renderAll(Object.values(this.messages).filter(Boolean));
    SIDES.forEach((side) => this.showSide(side));
    this.showVerdict();
  }

  /** Write the sides that are missing, both at once. */
  async write() {
    await Promise.all(SIDES.filter((side) => !this.comparison[side]).map((side) => this.writeSide(side)));
    this.showVerdict();
    emit("conversations");
  }

  async writeSide(side) {
    const live = new Live();
    this.columns[side].body.replaceChildren(live.body);
    live.body.addEventListener("grown", () => this.grown());
    this.writing[side] = new AbortController();
    this.columns[side].element.setAttribute("aria-busy", "true");
    this.changed();
    try {
      await this.told(side, live);
      this.showSide(side);
    } catch (failure) {
      this.showFailure(side, failure);
    }
    delete this.writing[side];
    this.columns[side].element.removeAttribute("aria-busy");
    this.changed();
  }

  async told(side, live) {
    let done = null;
    const take = (event) => {
      if (event.type === "done") done = event;
      else live.take(event);
    };
    try {
      await stream(`/api/comparisons/${this.comparison.id}/reply/${side}`, { signal: this.writing[side].signal, take });
    } catch (error) {
      const isWritten = error.status === 409; // it was stored although nothing had arrived here when it was stopped
      if (error.name !== "AbortError" && !isWritten) throw error;
      done = await this.stored(side, live);
    }
    live.end();
    if (!done) return;
    this.messages[side] = done.message;
    this.comparison[side] = done.message.id;
    keepHtml(done.message, done.html);
  }

  /** What was stored of a side that was stopped; null where nothing was written yet. */
  async stored(side, live) {
    for (let tries = 0; tries === 0 || (tries < STORED.tries && live.text); tries += 1) {
      const found = await api(`/api/comparisons/${this.comparison.id}`);
      if (found[side]) {
        const { messages } = await api(`/api/conversations/${found.conversation}`);
        const message = messages.find((one) => one.id === found[side]);
        await renderAll([message]);
        return { message };
      }
      await new Promise((resolve) => { setTimeout(resolve, STORED.wait); });
    }
    return null;
  }

  stop() {
    Object.values(this.writing).forEach((one) => one.abort());
  }

  showSide(side) {
    const message = this.messages[side];
    if (!message) {
      this.showFailure(side, { message: t("compare_missing") });
      return;
    }
    const text = textPart(htmlOf(message), message.content);
    this.columns[side].body.replaceChildren(...replyParts(message, text));
  }

  showFailure(side, failure) {
    const run = () => this.writeSide(side).then(() => this.showVerdict());
    this.columns[side].body.append(problem(failure, [{ label: t("retry"), testid: "retry", run }]));
  }

  showVerdict() {
    const { choice, a, b } = this.comparison;
    if (choice) this.showResult();
    else if (a && b) this.verdict.replaceChildren(...this.ballot());
  }

  ballot() {
    const button = (choice) =>
      textButton(t(`choice_${choice}`), `choice-${choice}`, () => this.vote(choice), "quiet bordered");
    return [h("p", { class: "muted", text: t("compare_question") }),
      h("div", { class: "ballot", role: "group", "aria-label": t("compare_question") }, ...CHOICES.map(button))];
  }

  async vote(choice) {
    try {
      const path = `/api/comparisons/${this.comparison.id}/vote`;
      this.comparison = await api(path, { method: "PUT", body: { choice } });
    } catch (failure) {
      tellFailure(failure);
      return;
    }
    this.showVerdict();
    this.changed();
    this.verdict.querySelector("a")?.focus();
  }

  showResult() {
    const { choice, identities, conversation } = this.comparison;
    const link = (href, text, testid) => h("a", { href, text, testid });
    for (const side of SIDES) {
      const { element, name } = this.columns[side];
      name.textContent = `${t(`side_${side}`)} · ${identities[side].model}`;
      element.classList.toggle("winner", choice === side);
    }
    const said = t(`result_${choice}`, { a: identities.a.model, b: identities.b.model });
    this.verdict.replaceChildren(h("p", { role: "status", testid: "compare-result" }, h("strong", { text: said }), " ",
      link(`#/chat/${conversation}`, t("compare_to_chat"), "compare-to-chat"), " · ",
      link("#/arena", t("compare_to_arena"), "compare-to-arena")));
  }
}
