//! The output of `--help`, compared with help.txt. After a change run `UPDATE_GOLDEN=1 cargo test --test it -- help`
//! and review the difference.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::ocifs::{bounded, isolate};

/// The commands that help shows.
pub(crate) const COMMANDS: &[&[&str]] = &[
    &[],
    &["mount"],
    &["disk"],
    &["umount"],
    &["list"],
    &["status"],
    &["inspect"],
    &["ls"],
    &["cat"],
    &["export"],
    &["images"],
    &["pull"],
    &["profile"],
    &["profile", "show"],
    &["profile", "export"],
    &["profile", "import"],
    &["run"],
    &["bundle"],
    &["cache"],
    &["cache", "list"],
    &["cache", "rm"],
    &["cache", "prune"],
    &["cache", "drop"],
    &["cache", "verify"],
    &["index"],
    &["index", "build"],
    &["index", "push"],
    &["index", "verify"],
    &["completions"],
];

/// Returns the help of a command. The option is `--help`, or `-h` for the short one.
fn help(command: &[&str], option: &str) -> String {
    let mut program = Command::new(env!("CARGO_BIN_EXE_ocifs"));
    isolate(&mut program, Path::new("/"));
    let said = bounded(program.args(command).arg(option));
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{command:?}");
    said.text().to_owned()
}

#[test]
fn help_is_as_it_was_approved() {
    let mut text = String::new();
    for command in COMMANDS {
        let words = [&["ocifs"], *command, &["--help"]].concat().join(" ");
        text.push_str(&format!("$ {words}\n{}\n", help(command, "--help")));
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/help.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        return fs::write(golden, text).unwrap();
    }
    let approved = fs::read_to_string(&golden).unwrap();
    for (number, (is, was)) in text.lines().zip(approved.lines()).enumerate() {
        assert_eq!(is, was, "line {} of {}", number + 1, golden.display());
    }
    assert_eq!(text, approved, "{}", golden.display());
}

#[test]
fn global_options_have_a_heading_of_their_own() {
    for command in COMMANDS {
        for option in ["-h", "--help"] {
            let text = help(command, option);
            let (own, global) = text
                .split_once("Global options:")
                .unwrap_or_else(|| panic!("{command:?}"));
            for name in [
                "--store",
                "--cache-size",
                "--memory",
                "--timeout",
                "--config",
                "--quiet",
                "--verbose",
                "--log-format",
            ] {
                assert!(
                    global.contains(name) && !own.contains(&format!("  {name} ")),
                    "{command:?} {name}"
                );
            }
            for name in ["--help", "--json", "--platform", "--writable", "--to", "--all"] {
                assert!(!global.contains(&format!("  {name} ")), "{command:?} {name}");
            }
        }
    }
}
