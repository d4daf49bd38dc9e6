// What a small server touches at start-up: loads its dependencies, answers one request, and ends.
const express = require('express');
const dateFns = require('date-fns');
const lodash = require('lodash');
const rxjs = require('rxjs');
require('core-js/stable');

const app = express();
app.get('/', (_, response) => response.send(lodash.capitalize('ready')));
const server = app.listen(0, '127.0.0.1', async () => {
  const answer = await fetch(`http://127.0.0.1:${server.address().port}/`);
  console.log(await answer.text(), typeof rxjs.of, typeof dateFns.format, Object.keys(require.cache).length, 'modules');
  server.close();
  process.exit();
});
