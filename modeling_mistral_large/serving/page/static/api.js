// Requests to the server of this page. Addresses are relative to the page.

const KEY = 'mistral-large-api-key';

// What the server said, or that it said nothing.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? '';

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

async function request(address, options = {}) {
  const headers = { 'Content-Type': 'application/json' };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ServerError('The server does not respond. When it runs again, try again.');
  }
  if (!response.ok) throw new ServerError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  const text = await response.text().catch(() => '');
  try {
    const { error, detail } = JSON.parse(text);
    if (error?.message) return error.message;
    if (detail) return typeof detail === 'string' ? detail : JSON.stringify(detail);
  } catch {
    // Not JSON: of a proxy, perhaps.
  }
  return `HTTP ${response.status}${text ? `: ${text.slice(0, 500)}` : ''}`;
}

export const getSettings = async () => (await request('ui/settings')).json();

// `body` is JSON text.
export const post = (name, body) => request(`ui/${name}`, { method: 'POST', body });

export const postJson = async (name, fields) => (await post(name, JSON.stringify(fields))).json();

// Ask for a response and call `onChunk` with each chunk of it. `body` is JSON text.
export async function streamChat(body, signal, onChunk) {
  const response = await request('v1/chat/completions', { method: 'POST', body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === 'AbortError') throw error;
      throw new ServerError('The server went away in the middle of the response.');
    });
    if (done) throw new ServerError('The response ended early.');
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message ?? JSON.stringify(chunk.error));
      onChunk(chunk);
    }
  }
}
