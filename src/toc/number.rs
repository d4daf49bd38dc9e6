//! Numbers that a tar contains as text.

/// Parses decimal digits, nothing else. The value is at most `i64::MAX`, like sizes and offsets of files.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let value = digits.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })?;
    Some(value.unsigned_abs())
}
