// Timers, promises and a worker thread compute until told to end.
const fs = require('fs');
const { Worker } = require('worker_threads');

const status = process.argv[2];
const go = status + '.go';
const say = (text) => {
  fs.writeFileSync(status + '.new', text + '\n');
  fs.renameSync(status + '.new', status);
};
const step = (value, count) => {
  for (let n = 0; n < count; n++) value = (Math.imul(value, 1664525) + 1013904223) >>> 0;
  return value;
};
const fail = (error) => {
  say('failed: ' + error);
  process.exit(1);
};
process.on('uncaughtException', fail);

const table = new Map();
for (let n = 0; n < 5000; n++) table.set('key' + n, { n, text: 'value'.repeat(n % 7) });
const shared = new Int32Array(new SharedArrayBuffer(16));
const worker = new Worker(
  `const { workerData } = require('worker_threads');
   const shared = new Int32Array(workerData);
   while (Atomics.load(shared, 1) === 0) {
     Atomics.add(shared, 0, 1);
     Atomics.wait(shared, 2, 0, 2);
   }
   require('worker_threads').parentPort.postMessage('bye');`,
  { eval: true, workerData: shared.buffer },
);
let farewell = null;
worker.on('message', (text) => { farewell = text; });

let value = 1;
let blocks = 0;
let said = false;
let left = 20;
const timer = setInterval(async () => {
  value = step(value, 5000);
  blocks += 1;
  if (!said && blocks > 20 && Atomics.load(shared, 0) > 5) {
    said = true;
    say('ready');
  }
  if (!said || !fs.existsSync(go)) return;
  left -= 1;
  if (left === 0) {
    clearInterval(timer);
    const seen = Atomics.load(shared, 0);
    await new Promise((resolve) => setTimeout(resolve, 50));
    if (Atomics.load(shared, 0) <= seen) return fail('the worker has stopped');
    Atomics.store(shared, 1, 1);
    await new Promise((resolve) => worker.on('exit', resolve));
    if (farewell !== 'bye') return fail('the worker said ' + farewell);
    if (step(1, blocks * 5000) !== value) return fail('the result is wrong');
    for (let n = 0; n < 5000; n++) {
      const entry = table.get('key' + n);
      if (entry.n !== n || entry.text.length !== 5 * (n % 7)) return fail('table at ' + n);
    }
    const text = await fs.promises.readFile(process.argv[1], 'utf8');
    if (!text.includes('promises')) return fail('file');
    say('ok');
  }
}, 2);
