// Uploads images to the service one by one and shows their predictions. File names never leave the browser.
import {fetchExample, postImage, readFile} from './requests.js';

const PARALLEL_UPLOADS = 2;
const MAX_RETRIES = 5;  // automatic retries when the service is busy
const FORM_BYTES = 1024;  // size of a request in addition to its image
const PAUSED_STATES = ['busy', 'offline', 'token'];
const RUNNING_STATES = ['uploading', 'working'];

const page = find('main').dataset;
const messages = JSON.parse(page.messages);
const columns = JSON.parse(page.columns);
const maxBytes = Number(page.body);
const maxImages = Number(page.images);

let images = [];  // the images on the page, in their order
let pausedBy = null;  // why uploads are paused: one of PAUSED_STATES, or null
let retryTimer = 0;
let imageCount = 0;

function find(selector, parent = document) {
  return parent.querySelector(selector);
}

// Queue

/** Add images to the page and start their uploads. A source is {name, size, read}, where `read` resolves to a blob. */
function addImages(sources) {
  const added = sources.map(source => {
    imageCount += 1;
    return {...source, retries: 0, id: `image-${imageCount}`};
  });
  images.push(...added);
  for (const image of added) {
    addCard(image);
    if (image.size + FORM_BYTES > maxBytes) {
      const message = `the file has ${formatBytes(image.size)}, the limit is ${formatBytes(maxBytes)}`;
      finish(image, {code: 'E_BODY', message});
    }
  }
  added[0].card.scrollIntoView({block: 'nearest'});
  startUploads();
}

function addFiles(files) {
  if (page.ready !== 'yes' || files.length === 0) return;
  const accepted = [...files].slice(0, maxImages);
  if (!pausedBy) {
    const ignored = files.length - accepted.length;
    showNotice(ignored ? `At most ${maxImages} images at a time: ${ignored} of ${files.length} were not added.` : '');
  }
  addImages(accepted.map(file => ({name: file.name, size: file.size, read: () => readFile(file)})));
}

function startUploads() {
  if (pausedBy) return;
  const running = images.filter(image => RUNNING_STATES.includes(image.state)).length;
  const queued = images.filter(image => image.state === 'queued');
  queued.slice(0, PARALLEL_UPLOADS - running).forEach(upload);
}

async function upload(image) {
  showState(image, 'uploading');
  const response = await request(image);
  if (!images.includes(image)) return;  // the reader has cleared the page
  if (response.status === 200) {
    finish(image, response.images[0]);
  } else if (response.status === 'offline') {
    pause(image, 'offline', navigator.onLine ? messages.E_OFFLINE : messages.E_NO_NETWORK);
  } else if (response.status === 401) {
    askForToken(image);
  } else if (response.status === 429 || response.status >= 500) {
    retryLater(image, response);
  } else {
    finish(image, {code: response.code ?? `HTTP ${response.status}`, message: response.message ?? null});
  }
  startUploads();
}

/** Read and send an image. Resolves to a response in the form of `postImage`, with the status 'offline' without one. */
async function request(image) {
  try {
    const blob = await image.read();
    image.size = blob.size;
    return await postImage(blob, fraction => {
      find('progress', image.card).value = fraction;
      if (fraction === 1) showState(image, 'working');
    });
  } catch (error) {
    return 'status' in error ? error : {status: 'offline'};
  }
}

// Pauses

function pause(image, state, reason) {
  pausedBy = state;
  image.reason = reason;
  showState(image, state);
  showNotice(reason, {retry: state !== 'token', token: state === 'token'});
}

function retryLater(image, {code, message, retry}) {
  const reason = messages[code] ?? messages.E_BUSY;
  const seconds = Math.max(Number(retry) || 0, image.retries);
  image.retries += 1;
  if (image.retries > MAX_RETRIES) {
    pause(image, 'busy', `${reason} Gave up after ${image.retries} attempts. ${message ?? ''}`);
    return;
  }
  pause(image, 'busy', `${reason} Trying again in ${seconds} s (${image.retries} of ${MAX_RETRIES}).`);
  clearTimeout(retryTimer);
  retryTimer = setTimeout(() => {
    if (pausedBy === 'busy') resume();
  }, 1000 * seconds);
}

function askForToken(image) {
  let reason = sessionStorage.getItem('token') ? messages.E_WRONG_TOKEN : messages.E_TOKEN;
  if (pausedBy === 'token') reason = find('#reason').textContent;  // another image has asked already
  sessionStorage.removeItem('token');
  pause(image, 'token', reason);
  find('#secret').focus();
}

function resume() {
  pausedBy = null;
  showNotice('');
  for (const image of images) {
    if (PAUSED_STATES.includes(image.state)) showState(image, 'queued');
  }
  startUploads();
}

function retryNow() {
  for (const image of images) image.retries = 0;
  resume();
  if (page.ready !== 'yes') waitForModel();
}

function showNotice(text, {retry = false, token = false} = {}) {
  find('#reason').textContent = text;
  find('#notice').hidden = !text;
  find('#retry').hidden = !retry;
  find('#token').hidden = !token;
}

async function waitForModel() {
  try {
    const response = await fetch('ready');
    if (response.ok) {
      location.reload();
      return;
    }
  } catch {
    showNotice(messages.E_OFFLINE, {retry: true});
    return;
  }
  setTimeout(waitForModel, 1000);
}

// Display

function formatBytes(size) {
  return size < 1e5 ? `${Math.ceil(size / 1024)} kB` : `${(size / 2**20).toFixed(1)} MB`;
}

function formatThreshold(threshold) {
  return String(Number(Number(threshold).toFixed(4)));
}

/** Format a probability with three decimals, or as many as show on which side of the threshold it is. */
function formatProbability({p_pneumonia: p, threshold}) {
  const edges = [threshold, Number(threshold.toPrecision(4))];
  const isAmbiguous = digits => edges.some(edge => (p >= threshold) !== (Number(p.toFixed(digits)) >= edge));
  let digits = 3;
  while (digits < 9 && isAmbiguous(digits)) digits += 1;
  return p.toFixed(digits);
}

function addCard(image) {
  image.card = find('#image').content.firstElementChild.cloneNode(true);
  image.card.id = image.id;
  image.line = find('#rows').insertRow();
  find('h3', image.card).textContent = image.name;
  find('.plain', image.card).alt = `Image ${image.name}`;
  find('#images').append(image.card);
  showState(image, 'queued');
}

/** Show the prediction for `image`, or the error that it got instead of one. */
function finish(image, {explanation, ...fields}) {
  const empty = {status: 'error', p_pneumonia: null, prediction: null, threshold: Number(page.threshold)};
  image.row = {...empty, ...fields, path: image.name};
  image.read = null;  // frees the file
  showState(image, image.row.status === 'ok' ? 'done' : 'refused');
  if (explanation) showExplanation(image, explanation);
  const parts = ['.decision b', '.numbers', '.reason'].map(selector => find(selector, image.card).textContent);
  find('#live').textContent = `${image.name}: ${parts.filter(Boolean).join('. ')}`;
}

function showState(image, state) {
  image.state = state;
  image.card.dataset.state = state;
  find('.reason', image.card).textContent = describeState(image);
  if (state === 'done') showDecision(image);
  if (state === 'refused') showRefusal(image);
  showLine(image);
  showCounts();
}

function describeState({state, row, reason}) {
  if (state === 'done') return '';
  if (state === 'refused') return messages[row.code] ?? row.message ?? `The service rejected the image (${row.code}).`;
  return PAUSED_STATES.includes(state) ? reason : messages[state];
}

function showDecision({card, row}) {
  const probability = formatProbability(row);
  const threshold = formatThreshold(row.threshold);
  card.dataset.prediction = row.prediction;
  find('.decision b', card).textContent = row.prediction === 'PNEUMONIA' ? 'Pneumonia' : 'Normal';
  find('.numbers', card).textContent = `Probability of pneumonia ${probability}, threshold ${threshold}`;
  find('.threshold', card).textContent = `threshold ${threshold}`;
  const scale = find('.scale', card);
  scale.setAttribute('aria-label', `${probability} on a scale from 0 to 1, with the threshold at ${threshold}`);
  scale.style.setProperty('--p', row.p_pneumonia);
  scale.style.setProperty('--t', row.threshold);
}

function showRefusal({card, row}) {
  find('.decision b', card).textContent = 'No prediction';
  const repeatsReason = row.code === 'E_OUT_OF_DISTRIBUTION' || !row.message;
  find('.details', card).textContent = repeatsReason ? row.code : `${row.code}: ${row.message}`;
}

function showExplanation(image, explanation) {
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

function showPicture(node, png) {
  node.hidden = !png;
  if (png) node.src = `data:image/png;base64,${png}`;
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

/** Show the row of `image` in the table of all images. */
function showLine(image) {
  const {line, row} = image;
  const link = document.createElement('a');
  link.href = `#${image.id}`;
  link.textContent = image.name;
  let cells = ['', '', '', '', '', describeState(image)];
  if (row) {
    cells = [
      row.status,
      row.prediction ? formatProbability(row) : '',
      row.prediction ?? '',
      formatThreshold(row.threshold),
      row.code ?? '',
      row.code ? describeState(image) : row.message ?? '',
    ];
  }
  line.replaceChildren();
  for (const content of [link, ...cells]) line.insertCell().append(content);
  for (const column of [2, 4]) line.cells[column].className = 'right';
}

function showCounts() {
  const kinds = images.map(({row}) => {
    if (!row) return 'in progress';
    return row.prediction?.toLowerCase() ?? 'without a prediction';
  });
  const parts = [`${images.length} ${images.length === 1 ? 'image' : 'images'}`];
  for (const kind of ['pneumonia', 'normal', 'without a prediction', 'in progress']) {
    const count = kinds.filter(other => other === kind).length;
    if (count) parts.push(`${count} ${kind}`);
  }
  find('#count').textContent = parts.join(' · ');
  find('#results').hidden = images.length === 0;
  find('#save').disabled = !images.some(image => image.row);
}

// Download

/** Format a cell of a CSV file. A quote in front keeps spreadsheets from computing text that looks like a formula. */
function formatCell(value) {
  let text = String(value ?? '');
  if (typeof value === 'string' && /^'*[=+\-@\t\r\0]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function downloadTable() {
  const rows = images.map(image => image.row).filter(Boolean);
  const lines = rows.map(row => columns.map(name => formatCell(row[name])).join(','));
  const table = new Blob([[columns.join(','), ...lines, ''].join('\n')], {type: 'text/csv'});
  const link = document.createElement('a');
  link.href = URL.createObjectURL(table);
  link.download = 'predictions.csv';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function clearPage() {
  images = [];
  find('#images').replaceChildren();
  find('#rows').replaceChildren();
  resume();
  showCounts();
  find('#chooser').focus();
}

// Events

function handleDrag(event, isOver) {
  if (!event.dataTransfer?.types.includes('Files')) return;
  event.preventDefault();
  document.body.classList.toggle('dragging', isOver);
}

function handleToken(event) {
  event.preventDefault();
  const token = find('#secret').value.trim();
  if (!/^[\x20-\x7e]+$/.test(token)) {  // a header cannot contain other characters
    showNotice(messages.E_WRONG_TOKEN, {token: true});
    return;
  }
  sessionStorage.setItem('token', token);
  find('#secret').value = '';
  resume();
}

document.addEventListener('dragover', event => handleDrag(event, true));
document.addEventListener('dragleave', event => {
  if (!event.relatedTarget) handleDrag(event, false);
});
document.addEventListener('drop', event => {
  handleDrag(event, false);
  addFiles(event.dataTransfer.files);
});
find('#chooser').addEventListener('change', ({target}) => {
  addFiles(target.files);
  target.value = '';  // so that the same file can be chosen again
});
for (const button of document.querySelectorAll('[data-example]')) {
  const number = Number(button.dataset.example);
  const source = {name: `example-${number + 1}.png`, size: 0, read: () => fetchExample(number)};
  button.addEventListener('click', () => addImages([source]));
}
find('#token').addEventListener('submit', handleToken);
find('#retry').addEventListener('click', retryNow);
find('#save').addEventListener('click', downloadTable);
find('#clear').addEventListener('click', clearPage);
window.addEventListener('online', () => {
  if (pausedBy === 'offline') retryNow();
});
if (page.ready !== 'yes') waitForModel();
