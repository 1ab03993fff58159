// The page: what is typed and pressed, and what is shown.

import { apiKey, getSettings, postJson, setApiKey, streamChat } from './api.js';
import { Conversation, Response } from './conversation.js';
import { RunningView, editView, isSending, messageView, resultsForm, setNote, welcome } from './messages.js';
import { readPrompt, showPrompt } from './prompt.js';
import { element } from './view.js';

const SAMPLING = ['temperature', 'top_p', 'top_k', 'min_p', 'max_tokens', 'seed'];
const NARROW = matchMedia('(max-width: 899px)');
const HINT = 'Enter sends, Shift+Enter begins a new line, Escape stops';
const get = (id) => document.getElementById(id);

const conversation = new Conversation();
let server = { model: '', context: 0 };
let running = null; // The response that comes, and what stops it.
let editing = null; // The message that is being edited.
let typed = new Map(); // Results that are being typed in, by the index of their call.
let toolsError = '';
let isSaved = true;

// --- what is shown

function show() {
  const log = get('messages');
  const wasAtEnd = isAtEnd();
  const { messages } = conversation;
  const pending = running ? [] : conversation.pendingCalls();
  const shown = messages.map((message, index) => (message === editing
    ? editView(message, (changed) => keepEdit(index, changed), cancelEdit)
    : messageView(message, running ? null : {
      edit: () => { editing = message; show(); log.querySelector('.edit textarea').focus(); },
      regenerate: () => { truncate(index); respond(); },
      proceed: index === messages.length - 1 ? () => respond(message) : null,
    })));
  if (running) shown.push(running.view.root);
  else if (!messages.length) shown.push(welcome(server.model));
  else if (pending.length && !editing) shown.push(resultsForm(pending, typed, sendResults));
  log.replaceChildren(...shown);
  log.setAttribute('aria-busy', String(Boolean(running)));
  if (wasAtEnd) toEnd();
  get('send').hidden = Boolean(running);
  get('stop').hidden = !running;
  get('input').disabled = get('send').disabled = pending.length > 0;
  get('input').placeholder = pending.length ? 'The calls above wait for their results' : 'Message';
  for (const id of ['new', 'open', 'save', 'show-prompt']) get(id).disabled = Boolean(running);
}

const isAtEnd = () => {
  const log = get('messages');
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
};

const toEnd = () => { get('messages').scrollTop = get('messages').scrollHeight; };

function showError(text) {
  get('error').hidden = !text;
  get('error').firstElementChild.textContent = text;
  get('retry').hidden = conversation.messages.at(-1)?.role === 'assistant' || !conversation.messages.length;
}

function showContext(tokens) {
  const of = server.context ? ` of ${server.context.toLocaleString('en')}` : '';
  get('context').textContent = `${tokens.toLocaleString('en')}${of} tokens`;
  get('context-bar').max = server.context || 1;
  get('context-bar').value = tokens;
}

async function countContext() {
  if (!conversation.messages.length) {
    showContext(0);
    return;
  }
  try {
    showContext((await readPrompt(conversation)).tokens);
  } catch {
    // What is wrong with it, a request says.
  }
}

// --- what is done

// Put a changed message in its place, without those after it, and go on where the model is next.
function keepEdit(index, changed) {
  editing = null;
  truncate(index);
  conversation.messages.push(changed);
  if (changed.role !== 'assistant' && !conversation.pendingCalls().length) {
    respond();
    return;
  }
  showError('');
  show();
  countContext();
}

function cancelEdit() {
  editing = null;
  show();
}

function sendResults(results) {
  conversation.messages.push(...results);
  typed = new Map();
  respond();
}

function truncate(length) {
  conversation.truncate(length);
  typed = new Map();
  isSaved = false;
}

function sampling() {
  const given = SAMPLING.map((name) => [name, get(name).valueAsNumber]);
  return Object.fromEntries(given.filter(([, value]) => !Number.isNaN(value)));
}

// Ask for a response to the conversation, or for more of its last message.
async function respond(begun = null) {
  if (running) return;
  showError('');
  if (toolsError) {
    show();
    showError(toolsError);
    return;
  }
  if (begun) conversation.messages.pop();
  const asked = begun ? [...conversation.messages, { ...begun, prefix: true }] : conversation.messages;
  const response = new Response(begun ? { ...begun } : undefined);
  const abort = new AbortController();
  const view = new RunningView(response);
  running = { abort, view };
  isSaved = false;
  const timer = setInterval(() => view.update(), 100);
  get('status').textContent = 'The model responds';
  toEnd();
  show();
  let problem = '';
  let remark = '';
  let wantsKey = false;
  try {
    const fields = { model: server.model, stream: true, stream_options: { include_usage: true }, ...sampling() };
    await streamChat(conversation.request(fields, asked), abort.signal, (chunk) => {
      const wasAtEnd = isAtEnd();
      response.add(chunk);
      view.update();
      if (wasAtEnd) toEnd();
    });
  } catch (error) {
    if (error.name === 'AbortError') remark = 'stopped';
    else {
      problem = error.message;
      remark = 'interrupted';
      wantsKey = error.status === 401;
    }
  }
  clearInterval(timer);
  running = null;
  finish(response, begun, remark, problem);
  if (wantsKey) askForKey();
}

function finish(response, begun, remark, problem) {
  if (response.isEmpty) {
    // No prompt can hold an empty response.
    if (begun) conversation.messages.push(begun);
  } else {
    const { message } = response;
    setNote(message, [response.stats(), remark].filter(Boolean).join(' · '));
    conversation.messages.push(message);
  }
  show();
  if (problem) showError(problem);
  else if (response.isEmpty && !begun) showError(remark ? 'Stopped before the first token.' : 'The response was empty.');
  get('status').textContent = problem || !conversation.pendingCalls().length ? HINT : 'The model calls a function';
  const { usage } = response;
  if (usage && !remark) showContext(usage.prompt_tokens + usage.completion_tokens);
  else countContext();
  // Not while something else is being typed.
  if (document.activeElement === document.body) (get('messages').querySelector('.results textarea') ?? get('input')).focus();
}

function send() {
  const text = get('input').value;
  if (!text.trim() || running || get('input').disabled) return;
  conversation.messages.push({ role: 'user', content: text });
  get('input').value = '';
  editing = null;
  fit();
  toEnd();
  respond();
}

// The composer is as high as its text.
function fit() {
  const area = get('input');
  area.rows = Math.min(12, area.value.split('\n').length);
}

async function takeTools(text) {
  const note = get('tools-note');
  toolsError = '';
  conversation.tools = '';
  note.classList.remove('wrong');
  get('tools').value = text;
  if (!text.trim()) {
    note.textContent = "JSON definitions as OpenAI's API has them";
  } else {
    try {
      const read = await postJson('tools', { text });
      if (get('tools').value !== text) return;
      conversation.tools = read.text;
      note.textContent = `The model may call ${read.names.join(', ') || 'nothing'}`;
    } catch (error) {
      toolsError = error.message;
      note.textContent = error.message;
      note.classList.add('wrong');
    }
  }
  countContext();
}

async function openConversation(file) {
  try {
    const read = await postJson('conversation', { text: await file.text() });
    conversation.messages = read.messages;
    typed = new Map();
    editing = null;
    conversation.system = read.system;
    get('system').value = read.system;
    isSaved = true;
    showError('');
    show();
    toEnd();
    await takeTools(read.tools);
  } catch (error) {
    showError(`${file.name}: ${error.message}`);
    get('retry').hidden = true;
  }
}

function saveConversation() {
  if (!conversation.messages.length) {
    showError('There is nothing to save yet.');
    return;
  }
  const address = URL.createObjectURL(new Blob([conversation.fileText()], { type: 'application/json' }));
  const time = new Date().toISOString().slice(0, 19).replaceAll(/[T:]/g, '-');
  element('a', { href: address, download: `conversation-${time}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
  isSaved = true;
}

function askForKey() {
  openSettings(true);
  get('key').focus();
}

function openSettings(isOpen) {
  get('settings').hidden = !isOpen;
  get('toggle').setAttribute('aria-expanded', String(isOpen));
}

async function start() {
  try {
    server = await getSettings();
    document.title = server.model.split('/').pop();
    get('model').textContent = server.model.split('/').pop();
    get('model').title = server.model;
    showError('');
  } catch (error) {
    showError(error.message);
    if (error.status === 401) askForKey();
  }
  show();
  countContext();
}

async function openPrompt() {
  const draft = get('input').value;
  const messages = [...conversation.messages];
  if (draft.trim()) messages.push({ role: 'user', content: draft });
  if (!messages.length) {
    showError('There is no prompt yet: write a message first.');
    return;
  }
  try {
    await showPrompt(conversation, messages);
  } catch (error) {
    showError(error.message);
  }
}

// --- what is pressed

get('composer').onsubmit = (event) => { event.preventDefault(); send(); };
get('input').oninput = fit;
get('input').onkeydown = (event) => { if (isSending(event)) { event.preventDefault(); send(); } };
get('stop').onclick = () => running?.abort.abort();
get('retry').onclick = () => respond();
get('new').onclick = () => {
  if (!isSaved && !confirm('Begin a new conversation? This one was not saved.')) return;
  editing = null;
  truncate(0);
  isSaved = true;
  showError('');
  show();
  countContext();
  get('input').focus();
};
get('save').onclick = saveConversation;
get('show-prompt').onclick = openPrompt;
get('toggle').onclick = () => openSettings(get('settings').hidden);
get('system').oninput = () => { conversation.system = get('system').value; isSaved = !conversation.messages.length; };
get('system').onchange = countContext;
get('tools').onchange = () => takeTools(get('tools').value);
get('key').value = apiKey();
get('key').onchange = () => { setApiKey(get('key').value.trim()); start(); };
for (const [id, take] of [['conversation-file', openConversation], ['tools-file', async (f) => takeTools(await f.text())]]) {
  get(id).onchange = async () => {
    const [file] = get(id).files;
    if (file) await take(file);
    get(id).value = '';
  };
}
get('open').onclick = () => get('conversation-file').click();
get('open-tools').onclick = () => get('tools-file').click();
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !get('prompt').open) running?.abort.abort();
});
addEventListener('beforeunload', (event) => { if (!isSaved && conversation.messages.length) event.preventDefault(); });

openSettings(!NARROW.matches);
start();
