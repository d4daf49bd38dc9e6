//! Text that images control, made safe for errors.

use std::fmt::{self, Write as _};

/// Most characters shown of one text. No name that people use is longer. More would let an image fill the terminal.
const MAX_SHOWN: usize = 300;

/// Text in one line of bounded length, without characters that a terminal would obey or would not show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a>(&'a str);

/// Returns `text` of an image in a form that may stand in an error.
pub(crate) fn shown(text: &str) -> Shown<'_> {
    Shown(text)
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(MAX_SHOWN) {
            match c {
                '"' | '\'' | '\\' => f.write_char(c)?,
                _ => write!(f, "{}", c.escape_debug())?,
            }
        }
        match chars.next() {
            Some(_) => f.write_char('…'),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_is_cut_and_escaped() {
        for (text, want) in [
            ("", ""),
            ("application/vnd.x+json", "application/vnd.x+json"),
            (r#"it's "C:\x""#, r#"it's "C:\x""#),
            ("größe 大", "größe 大"),
            ("a\nb\r\t\0", "a\\nb\\r\\t\\0"),
            ("\u{1b}[31mred\u{7f}", "\\u{1b}[31mred\\u{7f}"),
            ("\u{202e}gpj", "\\u{202e}gpj"),
        ] {
            assert_eq!(shown(text).to_string(), want);
        }
        assert_eq!(shown(&"x".repeat(MAX_SHOWN)).to_string(), "x".repeat(MAX_SHOWN));
        let cut = "x".repeat(MAX_SHOWN) + "…";
        assert_eq!(shown(&"x".repeat(1 << 20)).to_string(), cut);
    }

    proptest! {
        #[test]
        fn nothing_shown_controls_a_terminal(text in proptest::collection::vec(any::<char>(), 0..400)) {
            let text: String = text.into_iter().collect();
            let shown = shown(&text).to_string();
            let controls = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
            prop_assert!(!shown.contains(controls));
        }
    }
}
