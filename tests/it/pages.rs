//! What the pages in src/docs say of the source: the tests that prove a promise, and the texts of errors.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Returns the texts of all Rust files below a directory.
fn sources(directory: &str) -> Vec<String> {
    let mut todo = vec![PathBuf::from(directory)];
    let mut texts = Vec::new();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            texts.push(fs::read_to_string(path).unwrap());
        }
    }
    texts
}

fn page(name: &str) -> String {
    fs::read_to_string(Path::new("src/docs").join(name)).unwrap()
}

/// Returns the code spans of a line.
fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Returns the names of the functions that follow a `#[test]`, and those in `proptest!`.
fn tests(source: &str) -> Vec<&str> {
    let name = |line: &'_ str| -> Option<usize> { line.find("fn ").map(|at| at + 3) };
    let mut names = Vec::new();
    let mut is_test = false;
    for line in source.lines() {
        is_test |= line.trim_start().starts_with("#[") && line.contains("test]");
        if let Some(at) = name(line).filter(|_| is_test) {
            names.push(line[at..].split('(').next().unwrap());
            is_test = false;
        }
    }
    names
}

#[test]
fn each_promise_names_tests_that_exist() {
    let sources = [sources("src"), sources("tests/it")].concat();
    let tests: BTreeSet<&str> = sources.iter().flat_map(|source| tests(source)).collect();
    assert!(tests.len() > 800 && tests.contains("each_promise_names_tests_that_exist"));
    let mut promises = 0;
    for line in page("semantics.md").lines() {
        let Some((_, last)) = line.strip_suffix(" |").and_then(|row| row.rsplit_once(" | ")) else {
            continue;
        };
        if last == "test" {
            continue;
        }
        let named: Vec<&str> = code_spans(last).collect();
        assert!(!named.is_empty(), "no test proves: {line}");
        for name in named {
            assert!(tests.contains(name), "there is no test {name}, which proves: {line}");
        }
        promises += 1;
    }
    assert!(promises > 20, "{promises}");
}

/// Whether all parts are in the text, in order.
fn has_in_order(mut text: &str, parts: &[&str]) -> bool {
    parts.iter().all(|part| match text.find(part) {
        Some(at) => {
            text = &text[at + part.len()..];
            true
        }
        None => false,
    })
}

#[test]
fn each_error_that_is_explained_exists() {
    // Long texts go on in the next line of the source.
    let joined = |line: String| -> String {
        let lines = line.split("\\\n").map(str::trim_start);
        lines.collect()
    };
    let lines: Vec<String> = sources("src")
        .into_iter()
        .flat_map(|text| joined(text).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let page = page("troubleshooting.md");
    let headings: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert!(headings.len() > 20, "{headings:?}");
    for heading in headings {
        let text = code_spans(heading).next().unwrap();
        // Other punctuation than that of the message only closes the sentence.
        let parts: Vec<&str> = text.split('…').map(str::trim).filter(|part| part.len() > 1).collect();
        assert!(!parts.is_empty(), "{heading}");
        assert!(
            lines
                .iter()
                .any(|line| line.contains('"') && has_in_order(line, &parts)),
            "no message of the source is: {text}"
        );
    }
}
