// Answers each message of a WebSocket with its number on the connection, and sends `tick N` every
// 20 ms. Writes its port to the file that its argument names.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');

const GUID = '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'; // RFC 6455, 1.3

function frame(text) {
  const body = Buffer.from(text);
  const head = body.length < 126
    ? Buffer.from([0x81, body.length])
    : Buffer.from([0x81, 126, body.length >> 8, body.length & 255]);
  return Buffer.concat([head, body]);
}

// Takes whole frames from the front of `bytes`, and returns the rest.
function take(bytes, found) {
  for (;;) {
    if (bytes.length < 2) return bytes;
    let len = bytes[1] & 127;
    let at = 2;
    if (len === 126) {
      if (bytes.length < 4) return bytes;
      len = bytes.readUInt16BE(2);
      at = 4;
    }
    if (bytes.length < at + 4 + len) return bytes;
    const mask = bytes.subarray(at, at + 4);
    const body = Buffer.from(bytes.subarray(at + 4, at + 4 + len));
    for (let i = 0; i < len; i++) body[i] ^= mask[i & 3];
    found(body.toString());
    bytes = bytes.subarray(at + 4 + len);
  }
}

const server = http.createServer((request, answer) => answer.end('no WebSocket\n'));
server.on('upgrade', (request, socket, rest) => {
  const key = request.headers['sec-websocket-key'];
  const accept = crypto.createHash('sha1').update(key + GUID).digest('base64');
  socket.write('HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n' +
    `Connection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`);
  let number = 0;
  let ticks = 0;
  let bytes = rest;
  const timer = setInterval(() => socket.write(frame(`tick ${++ticks}`)), 20);
  socket.on('data', (more) => {
    bytes = take(Buffer.concat([bytes, more]), (text) => socket.write(frame(`${++number} ${text}`)));
  });
  socket.on('close', () => clearInterval(timer));
  socket.on('error', () => socket.destroy());
});
server.listen(0, '127.0.0.1', () => {
  const path = process.argv[2];
  fs.writeFileSync(path + '.new', String(server.address().port));
  fs.renameSync(path + '.new', path);
});
