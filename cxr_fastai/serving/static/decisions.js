// Decisions at a threshold, and how decisions and numbers are written on the page and in the CSV file.
import {messages} from './page.js';

export const PAUSED_STATES = ['busy', 'offline', 'token'];
export const KINDS = ['PNEUMONIA', 'NORMAL', 'NO_PREDICTION', 'RUNNING'];  // the filters, in the order of their images if sorted
const WORDS = {PNEUMONIA: 'Pneumonia', NORMAL: 'Normal', NO_PREDICTION: 'No prediction', RUNNING: ''};

/**
 * Return `row`, a row of the service, with its prediction at another threshold; null means that of the model. The field
 * `model_threshold` keeps the latter. An image without a prediction, such as a rejected one, gets none.
 */
export function decide(row, threshold) {
  const decided = {...row, model_threshold: row.threshold};
  if (threshold === null) return decided;
  decided.threshold = threshold;
  if (row.prediction) decided.prediction = row.p_pneumonia >= threshold ? 'PNEUMONIA' : 'NORMAL';
  return decided;
}

/** Return which of `KINDS` an image is at `threshold`. */
export function kindOf({row}, threshold) {
  if (!row) return 'RUNNING';
  return decide(row, threshold).prediction ?? 'NO_PREDICTION';
}

export function describeKind(kind) {
  return WORDS[kind];
}

/** Say why an image has no prediction, or not yet; '' if it has one. */
export function describeState({state, row, reason}) {
  if (state === 'done') return '';
  if (state === 'no-prediction') return messages[row.code] ?? row.message ?? `The image has no prediction (${row.code}).`;
  return PAUSED_STATES.includes(state) ? reason : messages[state];
}

export function formatBytes(size) {
  return size < 1e5 ? `${Math.ceil(size / 1024)} kB` : `${(size / 2**20).toFixed(1)} MB`;
}

export function formatThreshold(threshold) {
  return String(Number(threshold.toFixed(4)));
}

/** Format a probability with three decimals, or as many as show on which side of the threshold it is. */
export function formatProbability({p_pneumonia: p, threshold}) {
  const edges = [threshold, Number(threshold.toPrecision(4))];
  const isAmbiguous = digits => edges.some(edge => (p >= threshold) !== (Number(p.toFixed(digits)) >= edge));
  let digits = 3;
  while (digits < 9 && isAmbiguous(digits)) digits += 1;
  return p.toFixed(digits);
}

/** Return the text of a CSV file with these columns of `rows`. */
export function formatTable(columns, rows) {
  const lines = rows.map(row => columns.map(name => formatCell(row[name])).join(','));
  return [columns.join(','), ...lines, ''].join('\n');
}

/** Format a cell of a CSV file. A quote in front keeps spreadsheets from computing text that looks like a formula. */
function formatCell(value) {
  let text = String(value ?? '');
  if (typeof value === 'string' && /^'*[=+\-@\t\r\0]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
