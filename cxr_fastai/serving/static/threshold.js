// The threshold control. Another threshold than that of the model changes the decisions on this page only.
import {formatThreshold, kindOf} from './decisions.js';
import {find, page} from './page.js';

const modelThreshold = Number(page.threshold);
const range = find('#range');
const number = find('#number');

let chosen = null;  // the threshold that the reader has chosen, or null for that of the model

/** Return the threshold that the reader has chosen, or null for that of the model. */
export function chosenThreshold() {
  return chosen;
}

/** Connect the control; `onChange` is called after each change. */
export function connectThreshold(onChange) {
  const change = threshold => {
    setThreshold(threshold);
    onChange();
  };
  find('.slider').style.setProperty('--model', modelThreshold);
  find('.own').textContent = `model: ${formatThreshold(modelThreshold)}`;
  setThreshold(null);
  range.addEventListener('input', () => change(parseThreshold(range.value)));
  number.addEventListener('change', () => {
    const isValid = number.value !== '' && Number(number.value) >= 0 && Number(number.value) <= 1;
    change(isValid ? parseThreshold(number.value) : chosen);
    if (!isValid) showNote(`Enter a number from 0 to 1. The threshold is still ${number.value}.`);
  });
  find('#restore').addEventListener('click', () => {
    change(null);
    range.focus();
  });
}

/** Set the threshold; null means that of the model. */
export function setThreshold(threshold) {
  chosen = threshold;
  const text = formatThreshold(chosen ?? modelThreshold);
  range.value = text;
  number.value = text;
  range.setAttribute('aria-valuetext', chosen === null ? `${text}, the threshold of the model` : text);
  find('#restore').disabled = chosen === null;
  find('.cut').classList.toggle('changed', chosen !== null);
}

/** Show each probability as a dot on the control, and say how many decisions differ from those of the model. */
export function showProbabilities(images) {
  const dots = images.filter(({row}) => row?.prediction).map(image => {
    const dot = document.createElement('i');
    dot.dataset.prediction = kindOf(image, chosen);
    dot.style.setProperty('--p', image.row.p_pneumonia);
    return dot;
  });
  find('#dots').replaceChildren(...dots);
  const changes = images.filter(image => kindOf(image, chosen) !== kindOf(image, null)).length;
  const differences = changes === 1 ? '1 decision differs' : `${changes || 'no'} decisions differ`;
  const model = formatThreshold(modelThreshold);
  showNote(chosen === null ? '' : `Changed from ${model}, the threshold of the model: ${differences}.`);
}

/** Return the threshold in `text`, with four decimals; null for the text by which that of the model is shown. */
function parseThreshold(text) {
  const threshold = Number(Number(text).toFixed(4));
  return threshold === Number(formatThreshold(modelThreshold)) ? null : threshold;
}

function showNote(text) {
  const note = find('#note');
  if (note.textContent !== text) note.textContent = text;  // an equal text would be announced again
}
