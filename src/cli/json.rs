//! What all JSON output has in common: each object says which version of its fields it has.
//!
//! `src/docs/json.md` lists the fields, and a test compares the list with the output of the commands.

use serde::Serialize;
use serde_json::Value;

/// Version of the fields of all output. New fields do not change it. It changes if a field goes away or changes its meaning.
const SCHEMA: u32 = 1;

/// Returns the JSON of a command, with the version of its fields. A list has the version in each of its objects, so that it
/// stays a list.
pub(super) fn versioned(output: impl Serialize) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(output)?;
    match &mut value {
        Value::Array(objects) => objects.iter_mut().for_each(mark),
        value => mark(value),
    }
    Ok(value)
}

fn mark(value: &mut Value) {
    if let Value::Object(object) = value {
        object.insert("schema".to_owned(), SCHEMA.into());
    }
}
