//! What the command makes from its own definition: manual pages and completions.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::common::ocifs::{Ocifs, bounded};
use crate::help::COMMANDS;

/// The commands of the snapshotter, whose help is not among those that are compared.
const SNAPSHOTTER: &[&[&str]] = &[&["snapshotter"], &["snapshotter", "check"]];

/// Makes the pages. Returns them by command, in order.
fn pages(host: &Ocifs) -> Vec<(&'static [&'static str], std::path::PathBuf)> {
    let directory = host.home().join("man");
    fs::create_dir(&directory).unwrap();
    host.ok(["man", directory.to_str().unwrap()]);
    let page = |command: &&'static [&'static str]| {
        let name = [&["ocifs"], *command].concat().join("-");
        (*command, directory.join(name + ".1"))
    };
    let pages: Vec<_> = COMMANDS.iter().chain(SNAPSHOTTER).map(page).collect();
    let made: BTreeSet<_> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(made, pages.iter().map(|(_, path)| path.clone()).collect());
    pages
}

#[test]
fn every_command_has_a_manual_page_without_flaws() {
    let host = Ocifs::new();
    for (command, page) in pages(&host) {
        // groff formats it, as for readers of Debian.
        let man = bounded(
            Command::new("man")
                .args(["--warnings", "--encoding=UTF-8", "--local-file"])
                .arg(&page)
                .env("LC_ALL", "C.UTF-8")
                .env("MANWIDTH", "100"),
        );
        assert_eq!((man.code, man.stderr.as_str()), (Some(0), ""), "{command:?}");
        let help = host.ok([command, &["--help"]].concat());
        let options = help.text().split_whitespace().filter(|word| word.starts_with("--"));
        // The text of a page has no line breaks within options, but accents them with backspaces on some devices.
        let plain: String = man.text().replace('\u{ad}', "");
        for option in options.map(|option| option.trim_end_matches([',', '.', ':', ';', ')', ']', '`'])) {
            assert!(plain.contains(option), "{command:?}: the page has no {option}");
        }
        // mandoc formats it on Alpine and BSDs.
        let lint = bounded(Command::new("mandoc").args(["-Tlint", "-Wwarning"]).arg(&page));
        let flaws: Vec<_> = lint
            .text()
            .lines()
            .filter(|line| !line.contains("skipping paragraph macro"))
            .collect();
        assert_eq!(flaws, [] as [&str; 0], "{command:?}");
    }
}

#[test]
fn the_day_of_the_pages_is_that_of_the_version_in_the_changelog() {
    let host = Ocifs::new();
    let (_, page) = &pages(&host)[0];
    let page = fs::read_to_string(page).unwrap();
    let title = page.lines().find(|line| line.starts_with(".TH")).unwrap();
    let changelog = fs::read_to_string("src/docs/changelog.md").unwrap();
    let newest = changelog.lines().find_map(|line| line.strip_prefix("## ")).unwrap();
    let (version, day) = newest.split_once(", ").unwrap();
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    assert_eq!(title, format!(".TH ocifs 1 {day} \"ocifs {version}\" ocifs"));
}

#[test]
fn shells_complete_commands_and_options() {
    let host = Ocifs::new();
    let script = host.ok(["completions", "bash"]);
    let directory = host.home();
    fs::write(directory.join("ocifs.bash"), script.text()).unwrap();
    let complete = |words: &[&str]| {
        let program = r#"
            source "$1"
            shift
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
            _ocifs ocifs "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}"
        "#;
        let path = directory.join("ocifs.bash");
        let said = bounded(Command::new("bash").args(["-c", program, "bash"]).arg(path).args(words));
        assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
        said.text().to_owned()
    };
    assert_eq!(complete(&["ocifs", "mo"]), "mount\n");
    assert_eq!(complete(&["ocifs", "cache", "pr"]), "prune\n");
    assert_eq!(complete(&["ocifs", "mount", "--writ"]), "--writable\n");
    assert_eq!(complete(&["ocifs", "mount", "--via", "er"]), "erofs\n");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let script = host.ok(["completions", shell]);
        for command in COMMANDS.iter().flat_map(|command| command.iter()) {
            assert!(script.text().contains(command), "{shell}: {command}");
        }
    }
}
