//! Escapes untrusted text, such as names from images, before it is printed.
//!
//! On a terminal, control characters are escaped, as ls(1) does. A file or pipe gets the bytes unchanged. JSON
//! strings are Unicode: invalid bytes of a name become U+FFFD. Such a name also has a second key with `_base64`
//! appended, which holds all its bytes in base64.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::IsTerminal as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Returns whether standard output is a terminal.
pub(super) fn on_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Escapes a name or another single value. On a terminal the result is one line. Backslashes are doubled there, so
/// that an escape differs from a backslash in the name.
pub(super) fn name(bytes: &[u8], on_terminal: bool) -> Cow<'_, [u8]> {
    if !on_terminal {
        return Cow::Borrowed(bytes);
    }
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                c if controls(c) => out.extend(c.escape_default()),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            // Writing to a string cannot fail.
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    Cow::Owned(out.into_bytes())
}

/// Escapes text as [`name`] does, for standard output.
pub(super) fn shown(text: &str) -> String {
    String::from_utf8_lossy(&name(text.as_bytes(), on_terminal())).into_owned()
}

/// Escapes text for an error message. An error message is always one line, so its text is always escaped.
pub(super) fn in_error(text: &str) -> String {
    String::from_utf8_lossy(&name(text.as_bytes(), true)).into_owned()
}

/// Escapes every control character in `lines` except newlines. The escapes are valid in JSON strings.
pub(super) fn harmless(lines: &str) -> Cow<'_, str> {
    let bad = |c: char| controls(c) && c != '\n';
    if !lines.contains(bad) {
        return Cow::Borrowed(lines);
    }
    let mut out = String::new();
    for c in lines.chars() {
        if bad(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Returns whether the character controls a terminal or changes the order in which it shows others.
fn controls(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Puts bytes into a JSON object under `key`. If the bytes are not UTF-8, also puts them in base64 under `key` with
/// `_base64` appended.
pub(super) fn put(object: &mut serde_json::Value, key: &str, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Cow::Owned(_) = text {
        object[format!("{key}_base64")] = STANDARD.encode(bytes).into();
    }
    object[key] = text.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_get_escapes_and_pipes_get_bytes() {
        for (bytes, escaped) in [
            (&b"plain name"[..], "plain name"),
            ("größe".as_bytes(), "größe"),
            (b"caf\xe9\xff", "caf\\xe9\\xff"),
            (b"\x1b[31m\n\t\x7f", "\\u{1b}[31m\\n\\t\\u{7f}"),
            ("\u{9b}2J\u{202e}gpj".as_bytes(), "\\u{9b}2J\\u{202e}gpj"),
            (b"a\\x", "a\\\\x"),
            (b"", ""),
        ] {
            assert_eq!(name(bytes, false), bytes);
            assert_eq!(String::from_utf8_lossy(&name(bytes, true)), escaped);
        }
    }

    #[test]
    fn lines_stay_lines() {
        assert_eq!(harmless("a\nb\\c"), "a\nb\\c");
        assert_eq!(
            harmless("a\n\x1b]0;x\x07\r\u{9b}"),
            "a\n\\u001b]0;x\\u0007\\u000d\\u009b"
        );
    }

    #[test]
    fn json_says_what_its_text_cannot() {
        let mut object = serde_json::json!({});
        put(&mut object, "name", b"caf\xe9");
        put(&mut object, "target", "café".as_bytes());
        let expected = serde_json::json!({"name": "caf\u{fffd}", "name_base64": "Y2Fm6Q==", "target": "café"});
        assert_eq!(object, expected);
    }
}
