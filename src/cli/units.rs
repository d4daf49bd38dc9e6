//! Sizes and times as people write them.

use std::str::FromStr;
use std::time::Duration;

/// A number of bytes: `64MiB`, `10G`, `1500000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size: write 1500000, 64MiB or 10GB");
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let bytes = number * factor as f64;
        if bytes > 1e18 {
            return Err(wrong());
        }
        Ok(Self(bytes as u64))
    }
}

impl<'de> serde::Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A deadline: `30s`, `2m`, or `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deadline(pub(super) Option<Duration>);

impl FromStr for Deadline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if matches!(text, "never" | "forever") {
            return Ok(Self(None));
        }
        match humantime::parse_duration(text) {
            Ok(duration) if !duration.is_zero() => Ok(Self(Some(duration))),
            _ => Err(format!("`{text}` is not a deadline: write 30s, 2m, or never")),
        }
    }
}

impl std::fmt::Display for Deadline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(time) => humantime::format_duration(time).fmt(f),
            None => f.write_str("never"),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Deadline {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Formats bytes with three digits and a binary unit.
pub(super) fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    match unit {
        "B" => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.2} {unit}"),
        _ if value < 100.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!("64MiB".parse(), Ok(Size(64 << 20)));
        assert_eq!("1.5g".parse(), Ok(Size(3 << 29)));
        assert_eq!("10GB".parse(), Ok(Size(10_000_000_000)));
        assert_eq!("0".parse(), Ok(Size(0)));
        for wrong in ["", "MiB", "-1", "1.2.3", "12 parsecs", "99999999999T"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
        assert_eq!(human(999), "999 B");
        assert_eq!(human(1 << 20), "1.00 MiB");
        assert_eq!(human(123 << 20), "123 MiB");
    }

    #[test]
    fn deadlines_are_read() {
        assert_eq!("30s".parse(), Ok(Deadline(Some(Duration::from_secs(30)))));
        assert_eq!("never".parse(), Ok(Deadline(None)));
        for text in ["1m 30s", "250ms", "never"] {
            assert_eq!(text.parse::<Deadline>().unwrap().to_string(), text);
        }
        assert!("0s".parse::<Deadline>().is_err() && "soon".parse::<Deadline>().is_err());
    }
}
