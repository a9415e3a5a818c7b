// The table of all images: a row for each image, sorted and filtered as the reader chooses.
import {decide, describeKind, describeState, formatProbability, kindOf, KINDS} from './decisions.js';
import {announce, copyTemplate, find, showName, showPicture} from './page.js';
import {chosenThreshold} from './threshold.js';

const SORT_KEYS = {
  name: image => image.name,
  probability: image => image.row?.p_pneumonia ?? null,
  decision: image => KINDS.indexOf(kindOf(image, chosenThreshold())),
};
const NEXT_DIRECTIONS = {none: 'ascending', ascending: 'descending', descending: 'none'};
const names = new Intl.Collator(undefined, {numeric: true});

let sorting = {column: '', direction: 'none'};

/** Connect the headers and the filters. `onChange` arranges the table, and `open` opens the row of an image. */
export function connectTable(onChange, open) {
  for (const button of document.querySelectorAll('[data-sort]')) {
    button.addEventListener('click', () => {
      const column = button.dataset.sort;
      const previous = column === sorting.column ? sorting.direction : 'none';
      sorting = {column, direction: NEXT_DIRECTIONS[previous]};
      showSorting();
      onChange();
    });
  }
  find('.filters').addEventListener('change', () => {
    onChange();
    announce(`Images shown: ${shownRows().length}`);
  });
  find('#rows').addEventListener('click', event => {
    const row = event.target.closest('tr');
    if (row) open(row.id);
  });
}

/** Add a row for `image` to the end of the table. */
export function addRow(image) {
  image.line = copyTemplate('row');
  image.line.id = image.id;
  showName(find('.name', image.line), image.name);
  find('#rows').append(image.line);
}

/** Show the state of `image`, or its decision at the chosen threshold, in its row. */
export function showRow(image) {
  const {line, state} = image;
  const kind = kindOf(image, chosenThreshold());
  line.dataset.state = state;
  line.dataset.prediction = kind;
  find('b', line).textContent = describeKind(kind);
  find('.reason', line).textContent = describeState(image) || image.row?.message || '';
  find('.number', line).textContent = '';
  if (state === 'done') showScore(line, decide(image.row, chosenThreshold()));
}

function showScore(line, row) {
  find('.number', line).textContent = formatProbability(row);
  find('.scale', line).style.setProperty('--p', row.p_pneumonia);
  find('.scale', line).style.setProperty('--t', row.threshold);
}

/** Show the small picture of an image, a PNG in base64. */
export function showThumbnail({line}, png) {
  showPicture(find('img', line), png);
}

/** Sort and filter the rows of `images`, and count them. */
export function arrangeTable(images) {
  const filter = find('.filters :checked').value;
  for (const {line} of images) line.hidden = filter !== 'all' && line.dataset.prediction !== filter;
  find('#none').hidden = images.length === 0 || shownRows().length > 0;
  moveRows(sort(images).map(image => image.line));
  showCounts(images);
}

/** Return the ids of the images that the table shows, in its order. */
export function shownRows() {
  return [...find('#rows').rows].filter(row => !row.hidden).map(row => row.id);
}

/** Move the focus to the row of `image`, or to the filters if they hide it. */
export function focusRow({line}) {
  const target = line.hidden ? find('.filters :checked') : find('button', line);
  target.focus();
}

/** Return `images` in the chosen order. Those without a value, such as a probability, are last. */
function sort(images) {
  const key = SORT_KEYS[sorting.column];
  if (sorting.direction === 'none') return images;
  const sign = sorting.direction === 'ascending' ? 1 : -1;
  const valued = images.filter(image => key(image) !== null);
  const others = images.filter(image => key(image) === null);
  return [...valued.sort((one, other) => sign * compare(key(one), key(other))), ...others];
}

function compare(one, other) {
  return typeof one === 'string' ? names.compare(one, other) : one - other;
}

/** Put the rows into this order. Moving an element takes its focus away, so it gets it back. */
function moveRows(lines) {
  const rows = find('#rows');
  if (lines.every((line, position) => line === rows.rows[position])) return;
  const focused = document.activeElement;
  rows.append(...lines);
  if (rows.contains(focused)) focused.focus({preventScroll: true});
}

function showSorting() {
  for (const button of document.querySelectorAll('[data-sort]')) {
    const isSorted = button.dataset.sort === sorting.column && sorting.direction !== 'none';
    const header = button.closest('th');
    if (isSorted) header.setAttribute('aria-sort', sorting.direction);
    else header.removeAttribute('aria-sort');
  }
}

function showCounts(images) {
  for (const option of document.querySelectorAll('.filters input')) {
    const count = images.filter(({line}) => option.value === 'all' || line.dataset.prediction === option.value).length;
    const label = option.closest('label');
    find('.count', label).textContent = count;
    label.hidden = option.value === 'RUNNING' && count === 0 && !option.checked;
  }
}
