// Requests to the service, and reading of files. The access token is kept in the session of the browser.

function authorization() {
  const token = sessionStorage.getItem('token');
  return token ? {Authorization: `Bearer ${token}`} : {};
}

/** Send one image. Resolves to {status, retry, ...JSON of the response}; rejects if the service cannot be reached. */
export function postImage(blob, onProgress) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append('images', blob, 'image');
    // XMLHttpRequest, because fetch does not report the progress of an upload.
    const request = new XMLHttpRequest();
    request.open('POST', 'v1/predict?explain=true');
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.responseType = 'json';
    request.upload.onprogress = event => onProgress(event.loaded / event.total);
    request.upload.onload = () => onProgress(1);
    request.onerror = reject;
    request.onload = () => {
      const retry = request.getResponseHeader('Retry-After');
      resolve({status: request.status, retry, ...request.response});
    };
    request.send(form);
  });
}

/** Fetch a synthetic image. Throws an error response in the form of `postImage` if the service refuses. */
export async function fetchExample(number) {
  const response = await fetch(`examples/${number}.png`, {headers: authorization()});
  if (response.ok) return response.blob();
  const body = await response.json().catch(() => ({}));
  throw {status: response.status, retry: response.headers.get('Retry-After'), ...body};
}

/** Return `file` if it can be read. A folder, or a file that was moved, cannot. */
export async function readFile(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw {status: 0, code: 'E_UNREADABLE'};
  }
  return file;
}
