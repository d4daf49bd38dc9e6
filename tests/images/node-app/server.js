// A small service as they are: loads its dependencies, then answers requests on port 8080 until it is stopped.
const express = require('express');
const dateFns = require('date-fns');
const lodash = require('lodash');
const rxjs = require('rxjs');
require('core-js/stable');

const app = express();
app.get('/', (_, response) => response.send(lodash.capitalize('ready')));
app.get('/time', (_, response) => rxjs.of(dateFns.formatISO(Date.now())).subscribe((time) => response.send(time)));
app.listen(8080, '127.0.0.1');
