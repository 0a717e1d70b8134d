// A conversation is a tree of messages: what is shown is the path from its start to one leaf.

/** The messages from the start to `tip`; `messages` is a Map by id. */
export function pathTo(messages, tip) {
  const path = [];
  for (let at = messages.get(tip); at; at = messages.get(at.parent)) path.unshift(at);
  return path;
}

/** A message and the others in its place, by age. */
export function variantsOf(messages, message) {
  return childrenOf(messages, message.parent);
}

/** What follows a message (null: what stands at the start), by age. */
export function childrenOf(messages, parent) {
  return [...messages.values()].filter((one) => one.parent === parent);
}

/** The youngest leaf below a message: where a person who chooses a variant goes on. */
export function leafBelow(messages, id) {
  const children = childrenOf(messages, id);
  return children.length ? leafBelow(messages, children.at(-1).id) : id;
}
