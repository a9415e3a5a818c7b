// The page, its settings and its messages.

export function find(selector, parent = document) {
  return parent.querySelector(selector);
}

export const page = find('main').dataset;
export const messages = JSON.parse(page.messages);

/** Say `text` to screen readers. */
export function announce(text) {
  find('#live').textContent = text;
}

/** Return a copy of the first element of the template with this `id`. */
export function copyTemplate(id) {
  return find(`#${id}`).content.firstElementChild.cloneNode(true);
}

/** Show the PNG in base64 in the image element `node`, or hide it if there is none. */
export function showPicture(node, png) {
  node.hidden = !png;
  if (png) node.src = `data:image/png;base64,${png}`;
}

/** Show the file `name` in `node`; a long one is broken after a separator rather than within a word. */
export function showName(node, name) {
  const parts = name.split(/(?<=[_.-])/);
  node.replaceChildren(...parts.flatMap(part => [part, document.createElement('wbr')]));
}
