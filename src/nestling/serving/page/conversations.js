// The list of conversations: newest first, searched on the service, renamed and deleted in place.

import { api } from "./api.js";
import { emit, on } from "./bus.js";
import { iconButton, textButton } from "./controls.js";
import { ask, tellFailure } from "./dialog.js";
import { debounced, h, isEnter } from "./dom.js";
import { period } from "./format.js";
import { t } from "./i18n.js";
import { icon } from "./icons.js";
import { runningIn } from "./replies.js";

const PAGE = 40;

/** The list with its search: {search, element, focus()}. */
export function conversationList() {
  const list = new List();
  on("conversations", () => list.load());
  on("busy", () => list.draw());
  on("here", ({ id }) => { list.here = id; list.draw(); });
  return { search: list.search, element: list.element, focus: () => list.input.focus(), load: () => list.load() };
}

class List {
  constructor() {
    this.here = null;
    this.items = [];
    this.next = null;
    this.renaming = null;
    this.failure = null;
    const label = t("search");
    this.input = h("input", {
      type: "search", placeholder: label, "aria-label": label, title: t("search_key"), testid: "search",
    });
    this.search = h("div", { class: "search" }, icon("search"), this.input);
    this.element = h("nav", { class: "conversations", "aria-label": t("conversations"), testid: "conversation-list" });
    this.input.addEventListener("input", debounced(() => this.load(), 200));
  }

  async load() {
    this.asked = Symbol("asked");
    const { asked } = this;
    try {
      const page = await this.fetch("");
      if (asked !== this.asked) return; // the words have changed meanwhile
      this.items = page.data;
      this.next = page.next;
      this.failure = null;
    } catch (failure) {
      this.failure = failure;
    }
    this.draw();
  }

  async more() {
    try {
      const page = await this.fetch(this.next);
      this.items.push(...page.data);
      this.next = page.next;
      this.draw();
    } catch (failure) {
      tellFailure(failure);
    }
  }

  fetch(after) {
    const query = new URLSearchParams({ search: this.input.value.trim(), limit: PAGE });
    if (after) query.set("after", after);
    return api(`/api/conversations?${query}`);
  }

  draw() {
    if (this.renaming) return; // what is being typed stays
    const parts = [];
    let group = null;
    for (const item of this.items) {
      const name = period(item.updated);
      if (name !== group) parts.push(h("h3", { text: t(name) }));
      group = name;
      parts.push(this.row(item));
    }
    const none = this.input.value ? t("nothing_found") : t("no_conversations");
    const said = this.failure?.message ?? (parts.length ? "" : none);
    if (said) parts.unshift(h("p", { class: "muted small", text: said }));
    if (this.next) parts.push(textButton(t("more"), "more", () => this.more()));
    this.element.replaceChildren(...parts);
  }

  row(item) {
    const title = h("span", { class: "title", text: item.title || t("untitled") });
    const current = item.id === this.here ? "page" : null;
    const link = h("a", { href: `#/chat/${item.id}`, "aria-current": current, testid: "conversation-open" }, title,
      runningIn(item.id) && h("i", { class: "dot", title: t("writing") }),
      item.snippet && h("span", { class: "snippet" }, ...this.marked(item.snippet)));
    const row = h("div", { class: "conversation", testid: "conversation", data: { id: item.id } }, link,
      iconButton("pencil", t("rename"), "conversation-rename", () => this.rename(row, item)),
      iconButton("trash", t("delete"), "conversation-delete", () => this.remove(item)));
    return row;
  }

  /** A text with the searched words in bold. */
  marked(text) {
    const words = this.input.value.trim();
    const place = text.toLowerCase().indexOf(words.toLowerCase());
    if (place < 0) return [text];
    const end = place + words.length;
    return [text.slice(0, place), h("mark", { text: text.slice(place, end) }), text.slice(end)];
  }

  rename(row, item) {
    const label = t("rename");
    const input = h("input", { value: item.title, maxlength: "200", "aria-label": label, testid: "rename-input" });
    this.renaming = item.id;
    const end = async (isKept) => {
      if (!this.renaming) return;
      this.renaming = null;
      const title = input.value.trim();
      if (isKept && title && title !== item.title) await this.patch(item, title);
      this.draw();
      this.element.querySelector(`[data-id="${item.id}"] a`)?.focus();
    };
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (isEnter(event)) end(true);
      if (event.key === "Escape") end(false);
    });
    row.replaceChildren(input);
    input.select();
  }

  async patch(item, title) {
    try {
      Object.assign(item, await api(`/api/conversations/${item.id}`, { method: "PATCH", body: { title } }));
    } catch (failure) {
      tellFailure(failure);
    }
  }

  async remove(item) {
    const content = [h("p", { text: t("delete_text", { title: item.title || t("untitled") }) })];
    if (!(await ask({ title: t("delete_title"), content, ok: t("delete"), danger: true }))) return;
    try {
      await api(`/api/conversations/${item.id}`, { method: "DELETE" });
    } catch (failure) {
      tellFailure(failure);
      return;
    }
    if (location.hash.endsWith(item.id)) location.hash = "#/chat";
    emit("conversations");
  }
}
