//! Filters of lists of snapshots, in containerd's grammar (its package `filters`).
//!
//! ```text
//! filter   = selector *("," selector)      all of them hold
//! selector = field *("." field) [operator value]
//! field    = quoted / name                 name = letters, digits, "_"
//! operator = "==" / "!=" / "~="            "~=" is a regular expression
//! value    = quoted / any but space and ","
//! ```
//! A selector without an operator holds if the field is there. Of several filters, one has to hold. Fields are `name`,
//! `parent`, `kind`, and `labels` with the label's name as the next field.

use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;

use super::error::SnapshotError;
use super::record::SnapshotRecord;

/// Longest filter that is parsed. Names and labels have at most 4096 bytes each; a longer filter only costs time.
const MOST_TEXT: usize = 64 << 10;
/// Most memory of a compiled regular expression.
const MOST_REGEX: usize = 1 << 20;

/// Filters of which one has to hold; without any, all snapshots pass.
#[derive(Debug)]
pub struct SnapshotFilters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Is(String),
    IsNot(String),
    Matches(Regex),
}

impl SnapshotFilters {
    /// Parses filters. An empty one holds for every snapshot.
    pub fn parse<'a>(filters: impl IntoIterator<Item = &'a String>) -> Result<Self, SnapshotError> {
        let parsed = filters.into_iter().map(|text| {
            let invalid = |reason: String| SnapshotError::Argument(format!("filter {text:?}: {reason}"));
            if text.len() > MOST_TEXT {
                return Err(SnapshotError::Argument("a filter is too long".to_owned()));
            }
            FilterParser(text.chars().peekable()).filter().map_err(invalid)
        });
        Ok(Self(parsed.collect::<Result<_, _>>()?))
    }

    /// Returns whether a snapshot passes.
    pub fn hold(&self, snapshot: &SnapshotRecord) -> bool {
        let holds = |filter: &Vec<Selector>| filter.iter().all(|selector| selector.holds(snapshot));
        self.0.is_empty() || self.0.iter().any(holds)
    }
}

impl Selector {
    fn holds(&self, snapshot: &SnapshotRecord) -> bool {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let label;
        let value = match path[..] {
            ["name"] => Some(snapshot.name.as_str()),
            ["parent"] => snapshot.parent.as_deref(),
            ["kind"] => Some(snapshot.kind.name()),
            ["labels", ..] => {
                label = path[1..].join(".");
                snapshot.labels.get(&label).map(String::as_str)
            }
            _ => None,
        };
        match &self.test {
            Test::Present => value.is_some_and(|value| !value.is_empty() || path[0] == "labels"),
            Test::Is(wanted) => value.unwrap_or_default() == wanted,
            Test::IsNot(other) => value.unwrap_or_default() != other,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

struct FilterParser<'a>(Peekable<Chars<'a>>);

impl FilterParser<'_> {
    fn filter(mut self) -> Result<Vec<Selector>, String> {
        let mut selectors = Vec::new();
        if self.0.peek().is_none() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            match self.0.next() {
                None => return Ok(selectors),
                Some(',') => {}
                Some(other) => return Err(format!("{other:?} where a comma is expected")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, String> {
        let mut path = vec![self.field()?];
        while self.0.next_if_eq(&'.').is_some() {
            path.push(self.field()?);
        }
        let operator: String = std::iter::from_fn(|| self.0.next_if(|c| "=!~".contains(*c))).collect();
        let test = match operator.as_str() {
            "" => Test::Present,
            "==" => Test::Is(self.value(false)?),
            "!=" => Test::IsNot(self.value(false)?),
            "~=" => {
                let text = self.value(true)?;
                let built = regex::RegexBuilder::new(&text).size_limit(MOST_REGEX).build();
                Test::Matches(built.map_err(|error| error.to_string())?)
            }
            other => return Err(format!("there is no operator {other:?}")),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, String> {
        if self.0.peek() == Some(&'"') {
            return self.quoted();
        }
        let name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
        let name: String = std::iter::from_fn(|| self.0.next_if(name)).collect();
        match name.is_empty() {
            true => Err("a field is expected".to_owned()),
            false => Ok(name),
        }
    }

    /// Reads a value. A regular expression may stand between two slashes or bars.
    fn value(&mut self, is_regex: bool) -> Result<String, String> {
        match self.0.peek() {
            Some('"') => self.quoted(),
            Some(&delimiter @ ('/' | '|')) if is_regex => self.delimited(delimiter),
            _ => {
                let plain = |c: &char| !c.is_whitespace() && *c != ',';
                let value: String = std::iter::from_fn(|| self.0.next_if(plain)).collect();
                match value.is_empty() {
                    true => Err("a value is expected".to_owned()),
                    false => Ok(value),
                }
            }
        }
    }

    /// Reads up to the delimiter that also begins the text. A backslash before the delimiter makes it part of the text.
    fn delimited(&mut self, delimiter: char) -> Result<String, String> {
        self.0.next();
        let mut text = String::new();
        while let Some(c) = self.0.next() {
            match c {
                '\\' if self.0.peek() == Some(&delimiter) => text.extend(self.0.next()),
                _ if c == delimiter => return Ok(text),
                _ => text.push(c),
            }
        }
        Err(format!("there is no closing {delimiter}"))
    }

    /// Reads a string literal of Go.
    fn quoted(&mut self) -> Result<String, String> {
        self.0.next();
        let mut bytes = Vec::new();
        let put = |bytes: &mut Vec<u8>, c: char| bytes.extend(c.encode_utf8(&mut [0; 4]).bytes());
        while let Some(c) = self.0.next() {
            match c {
                '"' => return String::from_utf8(bytes).map_err(|_| "a value is not UTF-8".to_owned()),
                '\\' => match self.0.next() {
                    Some('x') => bytes.push(self.number(16, 2)? as u8),
                    Some('u') => put(&mut bytes, character(self.number(16, 4)?)?),
                    Some('U') => put(&mut bytes, character(self.number(16, 8)?)?),
                    Some(digit @ '0'..='3') => {
                        bytes.push((digit as u32 - '0' as u32) as u8 * 64 + self.number(8, 2)? as u8);
                    }
                    Some(letter) => {
                        let letters = "abfnrtv\\\"";
                        let at = letters
                            .find(letter)
                            .ok_or_else(|| format!("there is no escape \\{letter}"))?;
                        bytes.push(b"\x07\x08\x0c\n\r\t\x0b\\\""[at]);
                    }
                    None => break,
                },
                _ => put(&mut bytes, c),
            }
        }
        Err("there is no closing quote".to_owned())
    }

    fn number(&mut self, radix: u32, digits: usize) -> Result<u32, String> {
        let mut value: u32 = 0;
        for _ in 0..digits {
            let digit = self.0.next().and_then(|c| c.to_digit(radix));
            let digit = digit.ok_or_else(|| format!("an escape needs {digits} digits"))?;
            value = value.wrapping_mul(radix).wrapping_add(digit);
        }
        Ok(value)
    }
}

fn character(number: u32) -> Result<char, String> {
    char::from_u32(number).ok_or_else(|| format!("there is no character {number:x}"))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::super::record::{SnapshotContent, SnapshotKind};
    use super::*;

    fn snapshot() -> SnapshotRecord {
        SnapshotRecord {
            name: "k8s.io/3/sha256:abc".to_owned(),
            parent: Some("a \"b\",c".to_owned()),
            kind: SnapshotKind::Committed,
            id: 1,
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            labels: [
                ("containerd.io/snapshot.ref".to_owned(), "sha256:abc".to_owned()),
                ("plain".to_owned(), String::new()),
                ("a.b".to_owned(), "c".to_owned()),
            ]
            .into(),
            content: SnapshotContent::Changes(None),
        }
    }

    fn holds(filters: &[&str]) -> Result<bool, String> {
        let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        let parsed = SnapshotFilters::parse(&filters).map_err(|error| error.to_string())?;
        Ok(parsed.hold(&snapshot()))
    }

    #[test]
    fn selectors_are_read_as_containerd_reads_them() {
        for (filter, expected) in [
            ("", true),
            ("name==k8s.io/3/sha256:abc", true),
            ("name!=k8s.io/3/sha256:abc", false),
            ("kind==committed", true),
            ("kind==active", false),
            (
                r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent=="a \"b\",c""#,
                true,
            ),
            (r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent=="""#, false),
            ("labels.plain", true),
            ("labels.a.b==c", true),
            ("labels.none", false),
            ("labels.none==\"\"", true),
            ("name~=^k8s.io/[0-9]+/", true),
            (r"name~=/^k8s\.io\/3/", true),
            ("name~=|sha512|", false),
            (r#"name~="sha\x32\u0035\066:abc$""#, true),
            ("nothing", false),
        ] {
            assert_eq!(holds(&[filter]), Ok(expected), "{filter}");
        }
        assert_eq!(holds(&[]), Ok(true));
        assert_eq!(holds(&["kind==view", "kind==committed"]), Ok(true));
        for filter in [
            "=",
            "name=x",
            "name==",
            "name==a b",
            "name==a,",
            "\"",
            "name~=(",
            r#"name=="\q""#,
        ] {
            assert!(holds(&[filter]).is_err(), "{filter}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(filter in r#"[a-z."\\=~!,/|x0-9 (]{0,40}"#) {
            let _ = holds(&[&filter]);
        }
    }
}
