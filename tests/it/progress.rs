//! The progress of a layer, in the status of a mount and on a terminal.

use std::process::Command;
use std::time::Duration;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, bounded, eventually, isolate, mountpoint};
use crate::common::registry::{Fault, TestRegistry};

/// Returns an image of one layer that takes seconds to arrive.
fn slow_image() -> (TestRegistry, String) {
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("f", noise(1, 2 << 20)).finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    registry.fault(
        &layer.path(),
        usize::MAX,
        Fault::Slow(layer.bytes.len() / 100, Duration::from_millis(20)),
    );
    let image = format!("{}/app:1", registry.host());
    (registry, image)
}

#[test]
fn a_mount_in_preparation_says_how_fast_and_how_long() {
    let (_registry, image) = slow_image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&image, &[]);
    let mut status = mount.status();
    eventually("there is a rate", || {
        assert_eq!(status["state"], "preparing");
        let there = status["rate"].is_number();
        if !there {
            status = mount.status();
        }
        there
    });
    let number = |name: &str| status[name].as_f64().unwrap();
    let left = number("size") - number("fetched");
    assert!(number("rate") > 0.0 && left > 0.0, "{status}");
    assert!(
        (number("remaining_seconds") - left / number("rate")).abs() < 0.001,
        "{status}"
    );
    let said = ocifs.ok(["status", mount.path().to_str().unwrap()]);
    assert!(
        said.text().contains("/s, about ") && said.text().contains(" s left"),
        "{said:?}"
    );
    assert!(mount.read("f") == noise(1, 2 << 20));
    let status = mount.status();
    assert!(
        status["rate"].is_null() && status["remaining_seconds"].is_null(),
        "{status}"
    );
}

/// Returns what a command shows on a terminal.
fn on_terminal(ocifs: &Ocifs, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let command = ocifs.command(arguments);
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    let line = format!("stty cols 150; exec {}", words.join(" "));
    let mut terminal = Command::new("script");
    isolate(&mut terminal, ocifs.home());
    terminal
        .args(["-qec", &line, "/dev/null"])
        .env("TERM", "xterm")
        .envs(variables.iter().copied());
    let said = bounded(&mut terminal);
    assert_eq!(said.code, Some(0), "{said:?}");
    said.text().to_owned()
}

#[test]
fn nobody_gets_colours_or_a_bar_who_does_not_want_them() {
    let (_registry, image) = slow_image();
    // The command warns about a store that cannot be made.
    let shown = |options: &[&str], variables: &[(&str, &str)]| {
        let ocifs = Ocifs::at(std::path::Path::new("/dev/null/store"));
        on_terminal(&ocifs, &[options, &["ls", &image]].concat(), variables)
    };
    let coloured = shown(&[], &[]);
    assert!(
        coloured.contains("WARN") && coloured.contains("\x1b[33m"),
        "{coloured:?}"
    );
    let plain = shown(&[], &[("NO_COLOR", "1")]);
    assert!(plain.contains("WARN") && !plain.contains("\x1b[33m"), "{plain:?}");
    assert!(
        shown(&[], &[("NO_COLOR", "")]).contains("\x1b[33m"),
        "empty counts as not set"
    );
    let quiet = shown(&["-q"], &[]);
    assert!(!quiet.contains(['\x1b', '%', '[']) && quiet.contains(" f"), "{quiet:?}");
}

#[test]
fn a_terminal_gets_a_bar_and_a_pipe_does_not() {
    let (_registry, image) = slow_image();
    let path = mountpoint();
    let pull = vec!["pull", &image];
    let mount = vec!["mount", "--wait", "ready", &image, path.path().to_str().unwrap()];
    for arguments in [pull, mount] {
        let piped = Ocifs::new();
        let said = piped.ok(&arguments);
        assert!(!said.stderr.contains(['\r', '[', '\x1b']), "{said:?}");
        if arguments[0] == "mount" {
            piped.ok(["umount", path.path().to_str().unwrap()]);
        }
        let drawn = Ocifs::new();
        let shown = on_terminal(&drawn, &arguments, &[]);
        if arguments[0] == "mount" {
            drawn.ok(["umount", path.path().to_str().unwrap()]);
        }
        let bars: Vec<&str> = shown.split('\r').filter(|part| part.contains(" left")).collect();
        assert!(bars.len() > 1, "{shown:?}");
        let moving = bars
            .iter()
            .any(|bar| bar.contains("=>") && bar.contains("KiB/") && bar.contains("/s "));
        assert!(moving && bars[0].contains(&image), "{bars:?}");
    }
}
