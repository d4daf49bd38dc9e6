//! `WWW-Authenticate` challenges (RFC 9110 §11.6.1): a pure parser that tolerates sloppy servers.
//!
//! A header may hold several challenges, and a response several headers. A comma separates challenges as well as
//! parameters. The parser therefore takes a word followed by `=` as a parameter, and any other word as the start of a
//! challenge. It reports no errors. It skips what it does not understand, because an unusable challenge is as good as
//! none.

/// Longest header that is parsed, in bytes. A longer one gives no challenges. Real headers have a few hundred bytes.
const MAX_HEADER: usize = 16 * 1024;
/// Most challenges kept of a header, and most parameters kept of a challenge. The rest is ignored.
const MAX_ITEMS: usize = 32;

/// One challenge: its scheme and its parameters. Scheme and parameter names are in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme: `bearer`, `basic`, ...
    pub scheme: String,
    /// Names and values of the parameters, in the order of the header.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// Returns the value of the first parameter with this lower-case name, if the value is not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.parameters.iter().find(|(n, _)| n == name)?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }
}

/// Parses one header value into its challenges.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    if header.len() > MAX_HEADER {
        rest = "";
    }
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',' || c == '=' || c == '"');
        let (word, after) = take_word(rest);
        if word.is_empty() {
            return challenges;
        }
        let name = word.to_ascii_lowercase();
        if let Some(value) = after.trim_start().strip_prefix('=') {
            let (value, after) = take_value(value.trim_start());
            if let Some(challenge) = challenges.last_mut()
                && challenge.parameters.len() < MAX_ITEMS
            {
                challenge.parameters.push((name, value));
            }
            rest = after;
        } else {
            if challenges.len() == MAX_ITEMS {
                return challenges;
            }
            challenges.push(Challenge {
                scheme: name,
                parameters: Vec::new(),
            });
            rest = after;
        }
    }
}

fn take_word(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| c.is_whitespace() || matches!(c, ',' | '=' | '"'))
        .unwrap_or(text.len());
    text.split_at(end)
}

/// Splits off a value: a quoted string with backslash escapes, or else everything up to the next comma or space.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| c.is_whitespace() || c == ',').unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn docker_hub() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull""#;
        let challenges = parse(header);
        assert_eq!(challenges.len(), 1);
        assert_eq!(challenges[0].scheme, "bearer");
        assert_eq!(challenges[0].get("realm"), Some("https://auth.docker.io/token"));
        assert_eq!(challenges[0].get("service"), Some("registry.docker.io"));
        assert_eq!(challenges[0].get("scope"), Some("repository:library/alpine:pull"));
    }

    #[test]
    fn several_challenges_in_one_header() {
        let challenges = parse(r#"Negotiate, Basic realm="a, b=\"c\"" , BEARER Realm=https://x/y?z=1 ,service = s"#);
        let schemes: Vec<&str> = challenges.iter().map(|c| c.scheme.as_str()).collect();
        assert_eq!(schemes, ["negotiate", "basic", "bearer"]);
        assert_eq!(challenges[1].get("realm"), Some(r#"a, b="c""#));
        assert_eq!(challenges[2].get("realm"), Some("https://x/y?z=1"));
        assert_eq!(challenges[2].get("service"), Some("s"));
    }

    #[test]
    fn scopes_keep_commas_inside_quotes() {
        let challenges = parse(r#"Bearer scope="repository:a:pull,push",error="insufficient_scope""#);
        assert_eq!(challenges[0].get("scope"), Some("repository:a:pull,push"));
        assert_eq!(challenges[0].get("error"), Some("insufficient_scope"));
    }

    #[test]
    fn broken_headers_give_what_is_left() {
        for header in [
            "",
            ",,,",
            "=",
            "\"",
            "Bearer realm=\"unterminated",
            "realm=\"no scheme\"",
            "Bearer =",
        ] {
            let _ = parse(header);
        }
        assert_eq!(parse("Bearer realm=\"open")[0].get("realm"), Some("open"));
        assert!(parse("realm=x").is_empty());
        assert!(parse(&"a ".repeat(1 << 20)).is_empty());
    }

    proptest! {
        #[test]
        fn never_panics(header in ".{0,300}") {
            let _ = parse(&header);
        }

        #[test]
        fn quoted_values_survive(value in "[^\u{0}-\u{1f}]{1,40}", scheme in "[A-Za-z]{1,8}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let challenges = parse(&format!("{scheme} k=\"{quoted}\", j=1"));
            prop_assert_eq!(challenges.len(), 1);
            prop_assert_eq!(&challenges[0].scheme, &scheme.to_ascii_lowercase());
            prop_assert_eq!(challenges[0].get("k"), Some(value.as_str()));
            prop_assert_eq!(challenges[0].get("j"), Some("1"));
        }
    }
}
