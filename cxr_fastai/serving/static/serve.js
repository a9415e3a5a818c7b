// Uploads images to the service one by one and shows their predictions. File names never leave the browser.
import {decide, formatBytes, formatTable, PAUSED_STATES} from './decisions.js';
import {addCard, connectDetails, openDetails, showCard, showExplanation, showSingle} from './details.js';
import {announce, find, messages, page} from './page.js';
import {fetchExample, postImage, readFile} from './requests.js';
import {addRow, arrangeTable, connectTable, showRow, showThumbnail} from './table.js';
import {chosenThreshold, connectThreshold, setThreshold, showProbabilities} from './threshold.js';

const PARALLEL_UPLOADS = 2;
const MAX_RETRIES = 5;  // automatic retries when the service is busy
const FORM_BYTES = 1024;  // size of a request in addition to its image
const RUNNING_STATES = ['uploading', 'working'];

const columns = [...JSON.parse(page.columns), 'model_threshold'];
const maxBytes = Number(page.body);
const maxImages = Number(page.images);

let images = [];  // the images on the page, in their order
let pausedBy = null;  // why uploads are paused: one of PAUSED_STATES, or null
let retryTimer = 0;
let imageCount = 0;

// Queue

/** Add images to the page and start their uploads. A source is {name, size, read}, where `read` resolves to a blob. */
function addImages(sources) {
  const added = sources.map(source => {
    imageCount += 1;
    return {...source, retries: 0, id: `image-${imageCount}`};
  });
  for (const image of added) {
    images.push(image);
    addCard(image);
    addRow(image);
    showState(image, 'queued');
    if (image.size + FORM_BYTES > maxBytes) {
      const message = `the file has ${formatBytes(image.size)}, the limit is ${formatBytes(maxBytes)}`;
      finish(image, {code: 'E_BODY', message});
    }
  }
  find('#results').scrollIntoView({block: 'start'});
  startUploads();
}

function findImage(id) {
  return images.find(image => image.id === id);
}

function addFiles(files) {
  if (page.ready !== 'yes' || files.length === 0) return;
  const accepted = [...files].slice(0, maxImages);
  if (!pausedBy) {
    const ignored = files.length - accepted.length;
    const most = maxImages === 1 ? '1 image' : `${maxImages} images`;
    showNotice(ignored ? `At most ${most} at a time: ${ignored} of ${files.length} were not added.` : '');
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
      for (const bar of [find('progress', image.card), find('progress', image.line)]) bar.value = fraction;
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

/** Show the prediction for `image`, or the error that it got instead of one. */
function finish(image, {explanation, ...fields}) {
  const empty = {status: 'error', p_pneumonia: null, prediction: null, threshold: Number(page.threshold)};
  image.row = {...empty, ...fields, path: image.name};
  image.read = null;  // frees the file
  showState(image, image.row.status === 'ok' ? 'done' : 'no-prediction');
  if (explanation) {
    showExplanation(image, explanation);
    showThumbnail(image, explanation.image);
  }
  const parts = ['.decision b', '.numbers', '.reason'].map(selector => find(selector, image.card).textContent);
  announce(`${image.name}: ${parts.filter(Boolean).join('. ')}`);
}

function showState(image, state) {
  image.state = state;
  showCard(image);
  showRow(image);
  showImages();
}

/** Show the images in their order, and how many they are. */
function showImages() {
  arrangeTable(images);
  showSingle(images);
  showProbabilities(images);
  const running = images.filter(image => !image.row).length;
  const progress = running ? ` · ${running} in progress` : '';
  find('#count').textContent = `${images.length} ${images.length === 1 ? 'image' : 'images'}${progress}`;
  find('#results').hidden = images.length === 0;
  find('#save').disabled = running === images.length;
}

/** Show the decisions at another threshold. Images without a prediction stay as they are. */
function showDecisions() {
  for (const image of images.filter(({row}) => row?.prediction)) {
    showCard(image);
    showRow(image);
  }
  showImages();
}

// Download

function downloadTable() {
  const threshold = chosenThreshold();
  const rows = images.filter(image => image.row).map(image => decide(image.row, threshold));
  const table = new Blob([formatTable(columns, rows)], {type: 'text/csv'});
  const link = document.createElement('a');
  link.href = URL.createObjectURL(table);
  link.download = threshold === null ? 'predictions.csv' : `predictions-threshold-${threshold}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function clearPage() {
  images = [];
  find('#rows').replaceChildren();
  setThreshold(null);
  resume();
  showImages();
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
connectTable(showImages, id => openDetails(findImage(id)));
connectDetails(findImage);
connectThreshold(showDecisions);
find('#token').addEventListener('submit', handleToken);
find('#retry').addEventListener('click', retryNow);
find('#save').addEventListener('click', downloadTable);
find('#clear').addEventListener('click', clearPage);
window.addEventListener('online', () => {
  if (pausedBy === 'offline') retryNow();
});
if (page.ready !== 'yes') waitForModel();
