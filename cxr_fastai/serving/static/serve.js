// Images go to the service one by one, and their answers come onto the page. File names stay here.
'use strict';
const AT_ONCE = 2, TRIES = 5;  // images under way; how often a busy service is asked again
const FORM = 1024;  // bytes of a request beside its image
const HELD = ['busy', 'offline', 'token'];
const $ = (selector, within = document) => within.querySelector(selector);
const told = $('main').dataset, words = JSON.parse(told.words), columns = JSON.parse(told.columns);
let images = [], held = null, waiting = 0, numbered = 0;

// What is sent

function bearer() {
  const token = sessionStorage.getItem('token');
  return token ? {Authorization: `Bearer ${token}`} : {};
}

/** What the service says of the bytes `blob`: {status, retry, ...its JSON}. Rejects where it cannot be reached. */
function post(blob, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(), form = new FormData();
    form.append('images', blob, 'image');
    request.open('POST', 'v1/predict?explain=true');
    for (const [name, value] of Object.entries(bearer())) request.setRequestHeader(name, value);
    request.responseType = 'json';
    request.upload.onprogress = event => progress(event.loaded / event.total);
    request.upload.onload = () => progress(1);
    request.onerror = reject;
    request.onload = () => resolve({status: request.status, retry: request.getResponseHeader('Retry-After'),
                                    ...request.response});
    request.send(form);
  });
}

/** A synthetic image of the service. Throws what `post` would answer where there is none. */
async function fetchExample(number) {
  const got = await fetch(`examples/${number}.png`, {headers: bearer()});
  if (got.ok) return got.blob();
  throw {status: got.status, retry: got.headers.get('Retry-After'), ...await got.json().catch(() => ({}))};
}

/** A file, if it can be read: a folder cannot, nor what was moved. */
async function readFile(file) {
  try { await file.slice(0, 1).arrayBuffer(); } catch { throw {status: 0, code: 'E_UNREADABLE'}; }
  return file;
}

/** Take in images, each [name, size, how to read it]. */
function add(wanted) {
  const added = wanted.map(([name, size, read]) => ({name, size, read, tries: 0, id: `image-${++numbered}`}));
  images.push(...added);
  for (const image of added) {
    place(image);
    if (image.size + FORM <= told.body) continue;
    settle(image, {code: 'E_BODY', message: `${bytes(image.size)}, of ${bytes(told.body)} at most`});
  }
  added[0].card.scrollIntoView({block: 'nearest'});
  pump();
}

function addFiles(files) {
  if (told.ready !== 'yes' || !files.length) return;
  const taken = [...files].slice(0, told.images);
  if (!held) notice(taken.length < files.length
    ? `${files.length} images are too many at a time: the first ${taken.length} were taken.` : '');
  add(taken.map(file => [file.name, file.size, () => readFile(file)]));
}

function pump() {
  const under = images.filter(image => ['uploading', 'working'].includes(image.state)).length;
  if (!held) images.filter(image => image.state === 'queued').slice(0, AT_ONCE - under).forEach(run);
}

async function run(image) {
  show(image, 'uploading');
  let got;
  try {
    const blob = await image.read();
    image.size = blob.size;
    got = await post(blob, share => {
      $('progress', image.card).value = share;
      if (share === 1) show(image, 'working');
    });
  } catch (error) { got = 'status' in error ? error : {status: 'offline'}; }
  if (!images.includes(image)) return;  // cleared meanwhile
  if (got.status === 200) settle(image, got.images[0]);
  else if (got.status === 'offline') hold(image, 'offline', navigator.onLine ? words.E_OFFLINE : words.E_ALONE);
  else if (got.status === 401) askToken(image);
  else if (got.status === 429 || got.status >= 500) later(image, got);
  else settle(image, {code: got.code ?? `HTTP ${got.status}`, message: got.message ?? null});
  pump();
}

// What has to wait

function hold(image, state, why) {
  held = state;
  image.why = why;
  show(image, state);
  notice(why, state !== 'token', state === 'token');
}

function later(image, {code, message, retry}) {
  const seconds = Math.max(Number(retry) || 0, image.tries), why = words[code] ?? words.E_BUSY;
  if (++image.tries > TRIES) return hold(image, 'busy', `${why} It was asked ${image.tries} times. ${message ?? ''}`);
  hold(image, 'busy', `${why} Trying again in ${seconds} s (${image.tries} of ${TRIES}).`);
  clearTimeout(waiting);
  waiting = setTimeout(() => held === 'busy' && release(), 1000 * seconds);
}

function askToken(image) {
  const why = sessionStorage.getItem('token') ? words.E_WRONG_TOKEN : words.E_TOKEN;
  sessionStorage.removeItem('token');
  hold(image, 'token', held === 'token' ? $('#why').textContent : why);
  $('#secret').focus();
}

function release() {
  held = null;
  notice('');
  for (const image of images) if (HELD.includes(image.state)) show(image, 'queued');
  pump();
}

function again() {
  for (const image of images) image.tries = 0;
  release();
  if (told.ready !== 'yes') awaitReady();
}

function notice(why, again = false, token = false) {
  $('#why').textContent = why;
  $('#notice').hidden = !why;
  $('#again').hidden = !again;
  $('#token').hidden = !token;
}

async function awaitReady() {
  try { if ((await fetch('ready')).ok) return location.reload(); }
  catch { return notice(words.E_OFFLINE, true); }
  setTimeout(awaitReady, 1000);
}

// What is shown

const bytes = size => size < 1e5 ? `${Math.ceil(size / 1024)} kB` : `${(size / 2**20).toFixed(1)} MB`;
const short = p => String(+Number(p).toFixed(4)).replace(/^0(?=\.)/, '');
const whole = number => number.toLocaleString('en');

/** The probability of a row in as many digits as tell it from the threshold. */
function rounded({p_pneumonia: p, threshold: t}) {
  let digits = 3;
  while (digits < 9 && [t, Number(t.toPrecision(4))].some(edge => (p >= t) !== (Number(p.toFixed(digits)) >= edge))) digits++;
  return p.toFixed(digits).replace(/^0/, '');
}

function sentence({state, row, why}) {
  if (state === 'refused') return words[row.code] ?? row.message ?? `The service refuses it (${row.code}).`;
  return HELD.includes(state) ? why : words[state];
}

function place(image) {
  image.card = $('#image').content.firstElementChild.cloneNode(true);
  image.card.id = image.id;
  image.line = $('#rows').insertRow();
  $('h3', image.card).textContent = image.name;
  $('.plain', image.card).alt = `Image ${image.name}`;
  $('#images').append(image.card);
  show(image, 'queued');
}

/** An answer comes for `image`; what was not judged is a row all the same. */
function settle(image, {explanation, ...row}) {
  image.row = {status: 'error', p_pneumonia: null, prediction: null, threshold: Number(told.threshold), ...row,
              path: image.name};
  image.read = null;
  show(image, image.row.status === 'ok' ? 'done' : 'refused');
  if (explanation) picture(image, explanation);
  $('#live').textContent = `${image.name}: ${$('.decision', image.card).textContent} ${$('.why', image.card).textContent}`;
}

function show(image, state) {
  const {card, row} = image, write = (selector, text) => { $(selector, card).textContent = text; };
  image.state = card.dataset.state = state;
  write('.why', state === 'done' ? '' : sentence(image));
  if (state === 'refused') {
    write('.decision b', 'Not judged');
    write('.said', row.message && row.code !== 'E_OUT_OF_DISTRIBUTION' ? `${row.code}: ${row.message}` : row.code);
  }
  if (state === 'done') decide(card, row, write);
  tabulate(image);
  count();
}

function decide(card, row, write) {
  card.dataset.called = row.prediction;
  write('.decision b', row.prediction === 'PNEUMONIA' ? 'Pneumonia:' : 'Normal:');
  write('.figures', ` ${rounded(row)}, threshold ${short(row.threshold)}`);
  write('.from', `threshold ${short(row.threshold)}`);
  const scale = $('.scale', card);
  scale.setAttribute('aria-label', `${rounded(row)} on a scale from 0 to 1 with the threshold ${short(row.threshold)}`);
  scale.style.setProperty('--p', row.p_pneumonia);
  scale.style.setProperty('--t', row.threshold);
}

function picture({card, row, size}, explanation) {
  const [plain, map, toggle, opacity] = ['.plain', '.map', '.toggle', '.opacity'].map(one => $(one, card));
  for (const [node, png] of [[plain, explanation.image], [map, explanation.overlay]]) {
    node.hidden = !png;
    if (png) node.src = `data:image/png;base64,${png}`;
  }
  $('.blank', card).hidden = Boolean(explanation.image);
  $('.maps', card).hidden = !explanation.overlay;
  $('.note', card).textContent = explanation.note ? `No ${explanation.image ? 'map' : 'picture'}: ${explanation.note}.` : '';
  const facts = {format: explanation.format, mode: explanation.mode,
                 reading: row.status === 'ok' ? row.message || 'as it is stored' : '',
                 size: `${whole(explanation.width)} × ${whole(explanation.height)} px, ${bytes(size)}`};
  for (const [name, text] of Object.entries(facts)) $(`.${name}`, card).textContent = text;
  $('.reading', card).parentNode.hidden = !facts.reading;
  $('.facts', card).hidden = false;
  const fade = () => { map.style.opacity = toggle.checked ? opacity.value / 100 : 0; };
  toggle.checked = row.prediction === 'PNEUMONIA';
  toggle.onchange = fade;
  opacity.oninput = () => { toggle.checked = true; fade(); };
  fade();
}

function tabulate(image) {
  const {line, row} = image, link = document.createElement('a');
  Object.assign(link, {href: `#${image.id}`, textContent: image.name});
  const cells = row ? [row.status, row.prediction ? rounded(row) : '', row.prediction ?? '', short(row.threshold),
                       row.code ?? '', row.code ? sentence(image) : row.message ?? '']
                    : ['', '', '', '', '', sentence(image)];
  line.replaceChildren();
  for (const content of [link, ...cells]) line.insertCell().append(content);
  for (const number of [2, 4]) line.cells[number].className = 'right';
}

function count() {
  const kinds = images.map(({row}) => row ? row.prediction?.toLowerCase() ?? 'not judged' : 'under way');
  const counts = ['pneumonia', 'normal', 'not judged', 'under way'].map(
    kind => [kinds.filter(one => one === kind).length, kind]);
  const all = [images.length, images.length > 1 ? 'images' : 'image'];
  $('#count').textContent = [all, ...counts].filter(([n]) => n).map(pair => pair.join(' ')).join(' · ');
  $('#results').hidden = !images.length;
  $('#save').disabled = !images.some(image => image.row);
}

// What is taken away

/** A cell of a CSV; what a spreadsheet would reckon with gets a ' first, as in every table of this program. */
function cell(value) {
  const text = typeof value === 'string' && /^'*[=+\-@\t\r\0]/.test(value) ? `'${value}` : String(value ?? '');
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save() {
  const rows = images.filter(image => image.row).map(image => columns.map(name => cell(image.row[name])).join(','));
  const table = new Blob([[columns.join(','), ...rows, ''].join('\n')], {type: 'text/csv'});
  const link = document.createElement('a');
  Object.assign(link, {href: URL.createObjectURL(table), download: 'predictions.csv'});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function clear() {
  images = [];
  for (const place of ['#images', '#rows']) $(place).replaceChildren();
  release();
  count();
  $('#chooser').focus();
}

// What the reader does

function drag(event, over) {
  if (!event.dataTransfer?.types.includes('Files')) return;
  event.preventDefault();
  document.body.classList.toggle('dragging', over);
}
document.addEventListener('dragover', event => drag(event, true));
document.addEventListener('dragleave', event => event.relatedTarget || drag(event, false));
document.addEventListener('drop', event => { drag(event, false); addFiles(event.dataTransfer.files); });
$('#chooser').addEventListener('change', ({target}) => { addFiles(target.files); target.value = ''; });
for (const button of document.querySelectorAll('[data-example]')) button.addEventListener('click', () => {
  const number = Number(button.dataset.example);
  add([[`example-${number + 1}.png`, 0, () => fetchExample(number)]]);
});
$('#token').addEventListener('submit', event => {
  event.preventDefault();
  const secret = $('#secret').value.trim();
  if (!/^[\x20-\x7e]+$/.test(secret)) return notice(words.E_WRONG_TOKEN, false, true);  // no header can hold it
  sessionStorage.setItem('token', secret);
  $('#secret').value = '';
  release();
});
$('#again').addEventListener('click', again);
$('#save').addEventListener('click', save);
$('#clear').addEventListener('click', clear);
window.addEventListener('online', () => held === 'offline' && again());
if (told.ready !== 'yes') awaitReady();
