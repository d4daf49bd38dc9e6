//! The identity of this process as seen from outside its user namespace (user_namespaces(7)).

use std::fs;

/// Whether this process is root of the machine. Over the files of the machine, root of another user namespace has
/// only the rights of the ordinary user who made that namespace. It cannot write to /var and /run, nor use
/// `trusted.*` attributes.
pub fn is_system_root() -> bool {
    nix::unistd::geteuid().is_root() && is_root_namespace()
}

/// Whether this process is in the user namespace of the machine.
pub(super) fn is_root_namespace() -> bool {
    uid_map().is_none_or(|map| map.trim_end() == "0 0 4294967295")
}

/// Returns the user id of this process as the surrounding user namespace sees it. Several users can be root, each
/// in a namespace of its own; the outer id tells them apart.
pub(super) fn outer_uid() -> u32 {
    let uid = nix::unistd::geteuid().as_raw();
    uid_map().and_then(|map| translate(&map, uid)).unwrap_or(uid)
}

/// Returns the user id map of this process, with each run of blanks replaced by one. `None` if the kernel has no
/// user namespaces.
fn uid_map() -> Option<String> {
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    let lines = map
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    Some(lines.collect::<Vec<_>>().join("\n"))
}

/// Translates a user id of this namespace to the outer id. Each line of `map` has the first id inside, the first id
/// outside, and the number of ids.
fn translate(map: &str, uid: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split(' ').map(|number| number.parse::<u32>().ok());
        let (inside, outside, length) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let offset = uid.checked_sub(inside).filter(|offset| *offset < length)?;
        outside.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_outwards() {
        let map = "0 1000 1\n1 100000 65536";
        assert_eq!(translate(map, 0), Some(1000));
        assert_eq!(translate(map, 33), Some(100_032));
        assert_eq!(translate(map, 65_537), None);
    }
}
