// The details of an image: its picture with the map, its decision, and facts about its file; in a dialog if there are many.
import {decide, describeKind, describeState, formatBytes, formatProbability, formatThreshold, kindOf} from './decisions.js';
import {copyTemplate, find, showPicture, showName} from './page.js';
import {focusRow, shownRows} from './table.js';
import {chosenThreshold} from './threshold.js';

const dialog = find('#details');

let opened = null;  // the image in the dialog

/** Connect the dialog; `findImage` returns the image with an id. */
export function connectDetails(findImage) {
  const step = count => {
    const ids = shownRows();
    if (ids.length === 0) return;  // the filter hides the image since its prediction
    const position = ids.indexOf(opened.id) + count;
    showInDialog(findImage(ids.at(position % ids.length)));
  };
  find('#previous').addEventListener('click', () => step(-1));
  find('#next').addEventListener('click', () => step(1));
  find('#close').addEventListener('click', () => dialog.close());
  dialog.addEventListener('click', event => {
    if (event.target === dialog) dialog.close();  // the space around it
  });
  dialog.addEventListener('keydown', event => {
    const isTaken = event.target.type === 'range' || event.altKey || event.metaKey;  // by its handle, or by the browser
    if (isTaken) return;
    if (event.key === 'ArrowLeft') step(-1);
    if (event.key === 'ArrowRight') step(1);
  });
  dialog.addEventListener('close', () => focusRow(opened));
}

/** Open the details of `image`. The Escape key closes them. */
export function openDetails(image) {
  showInDialog(image);
  dialog.showModal();
}

function showInDialog(image) {
  opened = image;
  const ids = shownRows();
  find('#shown').replaceChildren(image.card);
  find('#position').textContent = `${ids.indexOf(image.id) + 1} of ${ids.length}`;
  dialog.setAttribute('aria-label', `Details of ${image.name}`);
  dialog.scrollTop = 0;
}

/** Show the details of a single image on the page itself, in place of the table. */
export function showSingle(images) {
  const isSingle = images.length === 1;
  find('#list').hidden = isSingle;
  find('#single').hidden = !isSingle;
  const cards = isSingle ? [images[0].card] : [];
  if (find('#single').firstElementChild !== (cards[0] ?? null)) find('#single').replaceChildren(...cards);
}

/** Make the details of `image`. */
export function addCard(image) {
  image.card = copyTemplate('image');
  showName(find('h3', image.card), image.name);
  find('.plain', image.card).alt = `Image ${image.name}`;
}

/** Show the state of `image`, or its decision at the chosen threshold. */
export function showCard(image) {
  const {card, state} = image;
  card.dataset.state = state;
  card.dataset.prediction = kindOf(image, chosenThreshold());
  find('.decision b', card).textContent = describeKind(card.dataset.prediction);
  find('.reason', card).textContent = describeState(image);
  if (state === 'done') showScore(card, decide(image.row, chosenThreshold()));
  if (state === 'no-prediction') showFailure(image);
}

function showScore(card, row) {
  const probability = formatProbability(row);
  const threshold = formatThreshold(row.threshold);
  const model = row.threshold === row.model_threshold ? '' : ` (the model's: ${formatThreshold(row.model_threshold)})`;
  find('.numbers', card).textContent = `Probability of pneumonia ${probability}, threshold ${threshold}${model}`;
  find('.threshold', card).textContent = `threshold ${threshold}`;
  const scale = find('.scale', card);
  scale.setAttribute('aria-label', `${probability} on a scale from 0 to 1, with the threshold at ${threshold}`);
  scale.style.setProperty('--p', row.p_pneumonia);
  scale.style.setProperty('--t', row.threshold);
}

function showFailure({card, row}) {
  const repeatsReason = row.code === 'E_OUT_OF_DISTRIBUTION' || !row.message;
  find('.details', card).textContent = repeatsReason ? row.code : `${row.code}: ${row.message}`;
}

/** Show the pictures of `image`, and facts about its file. */
export function showExplanation(image, explanation) {
  const {card} = image;
  showPicture(find('.plain', card), explanation.image);
  showPicture(find('.map', card), explanation.overlay);
  find('.blank', card).hidden = Boolean(explanation.image);
  if (explanation.note) {
    find('.note', card).textContent = `No ${explanation.image ? 'map' : 'picture'}: ${explanation.note}.`;
  }
  showFileFacts(image, explanation);
  connectMapControls(image, Boolean(explanation.overlay));
}

function showFileFacts({card, row, size}, {format, mode, width, height}) {
  find('.format', card).textContent = format;
  find('.mode', card).textContent = mode;
  find('.size', card).textContent = `${width.toLocaleString('en')} × ${height.toLocaleString('en')} px, ${formatBytes(size)}`;
  const isPredicted = row.status === 'ok';
  find('.reading', card).textContent = isPredicted ? row.message || 'unchanged' : '';
  find('.reading', card).parentNode.hidden = !isPredicted;
  find('.facts', card).hidden = false;
}

function connectMapControls({card, row}, hasMap) {
  const map = find('.map', card);
  const toggle = find('.toggle', card);
  const opacity = find('.opacity', card);
  const update = () => { map.style.opacity = toggle.checked ? opacity.value / 100 : 0; };
  find('.maps', card).hidden = !hasMap;
  toggle.checked = row.prediction === 'PNEUMONIA';
  toggle.onchange = update;
  opacity.oninput = () => {
    toggle.checked = true;
    update();
  };
  update();
}
