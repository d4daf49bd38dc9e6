//! Times in tables: RFC 3339, as Go writes it.

/// Seconds from the start of the year 0 to 1970.
const EPOCH: i64 = 719_528 * DAY;
const DAY: i64 = 24 * 3600;

/// Seconds since 1970, and nanoseconds to add.
pub(super) type Time = (i64, u32);

/// Reads a time such as `2024-02-29T12:00:00.5+01:00`. Returns none for anything else. Go's zero time, at the start of
/// the year 1, stands for no time at all and becomes 1970.
pub(super) fn parse(text: &str) -> Option<Time> {
    let bytes = text.as_bytes();
    let number = |from: usize, len: usize| -> Option<i64> {
        let digits = bytes.get(from..from + len)?;
        digits.iter().all(u8::is_ascii_digit).then_some(())?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    };
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if separators
        .iter()
        .any(|&(at, separator)| bytes.get(at) != Some(&separator))
    {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 2)?, number(8, 2)?);
    let (hour, minute, second) = (number(11, 2)?, number(14, 2)?, number(17, 2)?);
    if !(1..=12).contains(&month) || day < 1 || day > days_of(year, month) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (nanoseconds, zone) = fraction(&bytes[19..])?;
    let offset = match zone {
        b"Z" => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let at = bytes.len() - 5;
            let (hours, minutes) = (number(at, 2)?, number(at + 3, 2)?);
            let offset = hours * 3600 + minutes * 60;
            (hours < 24 && minutes < 60).then_some(())?;
            if *sign == b'-' { -offset } else { offset }
        }
        _ => return None,
    };
    let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second - offset - EPOCH;
    let unset = days(1, 1, 1) * DAY - EPOCH;
    Some(if (seconds, nanoseconds) == (unset, 0) {
        (0, 0)
    } else {
        (seconds, nanoseconds)
    })
}

/// Reads a fraction of a second, if there is one. Returns nanoseconds and what is behind the fraction.
fn fraction(rest: &[u8]) -> Option<(u32, &[u8])> {
    let Some(digits) = rest.strip_prefix(b".") else {
        return Some((0, rest));
    };
    let len = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
    (len > 0).then_some(())?;
    let (digits, rest) = digits.split_at(len);
    // Digits beyond nanoseconds are cut off.
    let padded = digits.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    Some((padded.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0')), rest))
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_of(year: i64, month: i64) -> i64 {
    match month {
        2 => 28 + i64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Returns the days from the start of the year 0 to a day.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // The year 0 is a leap year.
    let before = match year {
        0 => 0,
        year => {
            let last = year - 1;
            year * 365 + last / 4 - last / 100 + last / 400 + 1
        }
    };
    before + (1..month).map(|month| days_of(year, month)).sum::<i64>() + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", (0, 0)),
            ("2024-02-29T12:00:00Z", (1_709_208_000, 0)),
            ("2024-02-29T12:00:00.5+01:00", (1_709_204_400, 500_000_000)),
            ("2024-02-29T12:00:00.123456789-05:30", (1_709_227_800, 123_456_789)),
            ("1969-12-31T23:59:59.25Z", (-1, 250_000_000)),
            ("1900-03-01T00:00:00Z", (-2_203_891_200, 0)),
            ("2106-02-07T06:28:16Z", (4_294_967_296, 0)),
            ("9999-12-31T23:59:59Z", (253_402_300_799, 0)),
            ("0001-01-01T00:00:00Z", (0, 0)),
            ("0000-01-01T00:00:00Z", (-62_167_219_200, 0)),
            ("0001-01-02T00:00:00Z", (-62_135_510_400, 0)),
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn other_texts_are_no_times() {
        for text in [
            "",
            "Z",
            "2024-02-29",
            "2023-02-29T12:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-00-01T00:00:00Z",
            "2024-01-00T00:00:00Z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:60:00Z",
            "2024-01-01T00:00:61Z",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00+1:00",
            "2024-01-01T00:00:00+24:00",
            "2024-01-01 00:00:00Z",
            "+024-01-01T00:00:00Z",
            "2024-01-01T00:00:00ZZ",
            "2024-01-01T00:00:0é",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
