//! Checks the source against the module table of the crate documentation. Also checks that the files of a directory
//! do not use each other in a circle, and that no two types share a name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Returns the level of each module, from the table in src/lib.rs.
fn levels() -> BTreeMap<String, usize> {
    let text = fs::read_to_string("src/lib.rs").unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("//! | "));
    let mut levels = BTreeMap::new();
    for row in rows {
        let Some((level, modules)) = row.split_once(" | ") else {
            continue;
        };
        let Ok(level) = level.parse() else { continue };
        for module in modules.split('`').skip(1).step_by(2) {
            levels.insert(module.to_owned(), level);
        }
    }
    levels
}

fn sources(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        found.push(path.to_owned());
    }
}

/// Returns the modules that the code names as `crate::MODULE`, outside comments.
fn used(code: &str) -> Vec<String> {
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let word = |rest: &str| {
        rest.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    code.flat_map(|line| line.split("crate::").skip(1).map(word).collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_module_uses_only_modules_of_lower_levels() {
    let levels = levels();
    assert!(levels.len() > 10, "the table was not understood: {levels:?}");
    for entry in fs::read_dir("src").unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if ["docs", "lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let level = *levels
            .get(&module)
            .unwrap_or_else(|| panic!("module {module} is not in the table"));
        let mut files = Vec::new();
        sources(&path, &mut files);
        for file in files {
            for other in used(&fs::read_to_string(&file).unwrap()) {
                if other != module
                    && let Some(&lower) = levels.get(&other)
                {
                    assert!(
                        lower < level,
                        "{} (level {level}) uses {other} (level {lower})",
                        file.display()
                    );
                }
            }
        }
    }
}

#[test]
fn only_the_front_end_knows_fuser_and_only_the_registry_knows_http() {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    for (library, home) in [("fuser::", "src/fuse"), ("reqwest::", "src/registry")] {
        for file in &files {
            let code = fs::read_to_string(file).unwrap();
            let inside = file.to_str().unwrap().starts_with(home);
            let uses = code
                .lines()
                .any(|l| !l.trim_start().starts_with("//") && l.contains(library));
            assert!(inside || !uses, "{} uses {library}", file.display());
        }
    }
}

/// Returns the name of the type or trait that a line defines.
fn defined(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let rest = match line.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(')')?.1,
        Some(rest) => rest,
        None => line,
    };
    let (keyword, rest) = rest.trim_start().split_once(' ')?;
    let name = rest.split(|c: char| !c.is_alphanumeric()).next()?;
    (["struct", "enum", "trait", "type", "union"].contains(&keyword) && !name.is_empty()).then_some(name)
}

#[test]
fn no_two_types_of_a_crate_share_a_name() {
    // Names of associated types, which the traits give.
    let given = ["Err", "Future", "Item", "Response", "ResponseStream", "Value"];
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    let (command, library): (Vec<_>, Vec<_>) = files
        .into_iter()
        .partition(|file| file.starts_with("src/cli") || file.ends_with("main.rs"));
    for files in [command, library] {
        let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for file in files {
            let code = fs::read_to_string(&file).unwrap();
            for name in code.lines().filter_map(defined).filter(|name| !given.contains(name)) {
                places
                    .entry(name.to_owned())
                    .or_default()
                    .push(file.display().to_string());
            }
        }
        assert!(places.len() > 10, "the definitions were not understood: {places:?}");
        places.retain(|_, places| places.len() > 1);
        assert!(places.is_empty(), "{places:#?}");
    }
}

/// A path like `crate::index::format`, without `crate`.
type Module = Vec<String>;

/// Returns the paths that a file uses, as absolute paths. `module` is the module of the file.
fn paths(code: &str, module: &Module) -> BTreeSet<Module> {
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: Vec<&str> = lines.take_while(|line| *line != "#[cfg(test)]").collect();
    let code = code.join("\n");
    let mut found = BTreeSet::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            // Skips a match in the middle of a path.
            if !code[..at].ends_with("::") {
                flatten(&code[at..], &mut Vec::new(), &mut found);
            }
        }
    }
    let absolute = |path: &Module| {
        let mut base = match path[0].as_str() {
            "crate" => Module::new(),
            _ => module.clone(),
        };
        for name in path {
            match name.as_str() {
                "crate" | "self" => {}
                "super" => drop(base.pop()),
                name => base.push(name.to_owned()),
            }
        }
        base
    };
    found.iter().map(absolute).collect()
}

/// Reads one path, or a tree of paths in braces, from the start of `text`. Returns the length that it read.
fn flatten(text: &str, before: &mut Module, found: &mut BTreeSet<Module>) -> usize {
    let word = text.len() - text.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_').len();
    let depth = before.len();
    before.push(text[..word].to_owned());
    let mut at = word;
    let rest = &text[at..];
    if rest.starts_with("::{") {
        at += 3;
        while !text[at..].starts_with('}') && at < text.len() {
            match text[at..].starts_with(|c: char| c.is_alphanumeric() || c == '_') {
                true => at += flatten(&text[at..], before, found),
                false => at += text[at..].chars().next().map_or(1, char::len_utf8),
            }
        }
    } else if rest.starts_with("::") && rest[2..].starts_with(|c: char| c.is_alphanumeric() || c == '_') {
        at += 2;
        at += flatten(&text[at..], before, found);
    } else {
        found.insert(before.clone());
    }
    before.truncate(depth);
    at
}

/// Returns the names that a module re-exports, each with the file that it comes from.
fn passed_on(code: &str) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    for statement in code.split(';') {
        let Some(at) = statement.find("use ") else { continue };
        let text = statement[at + 4..].trim().trim_start_matches("self::");
        let mut found = BTreeSet::new();
        flatten(text, &mut Vec::new(), &mut found);
        for path in found.into_iter().filter(|path| path.len() > 1) {
            names.insert(path[path.len() - 1].clone(), path[0].clone());
        }
    }
    names
}

/// Returns the circles among the files of one directory. A file and the directory of its name count as one.
fn circles(directory: &Path, module: &Module) -> Vec<String> {
    let above = fs::read_to_string(directory.with_extension("rs")).unwrap_or_default();
    let passed_on = passed_on(&above);
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut files = Vec::new();
    sources(directory, &mut files);
    let names: BTreeSet<String> = files
        .iter()
        .map(|file| {
            let below = file.strip_prefix(directory).unwrap().with_extension("");
            below
                .components()
                .next()
                .unwrap()
                .as_os_str()
                .to_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    for file in &files {
        let below = file.strip_prefix(directory).unwrap().with_extension("");
        let parts: Module = below.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        let own = [&module[..], &parts[..]].concat();
        for path in paths(&fs::read_to_string(file).unwrap(), &own) {
            let Some(name) = path.strip_prefix(&module[..]).and_then(|rest| rest.first()) else {
                continue;
            };
            let target = if names.contains(name) {
                Some(name)
            } else {
                passed_on.get(name)
            };
            if let Some(target) = target.filter(|target| **target != parts[0] && names.contains(*target)) {
                uses.entry(parts[0].clone()).or_default().insert(target.clone());
            }
        }
    }
    let mut found = Vec::new();
    for name in &names {
        // Collects all files that can be reached from this one.
        let (mut reached, mut next) = (BTreeSet::new(), vec![name]);
        while let Some(at) = next.pop() {
            next.extend(
                uses.get(at)
                    .into_iter()
                    .flatten()
                    .filter(|used| reached.insert((*used).clone())),
            );
        }
        if reached.contains(name) {
            found.push(format!("{}/{name}.rs uses {:?}", directory.display(), uses[name]));
        }
    }
    found
}

#[test]
fn no_files_of_a_directory_use_each_other_in_a_circle() {
    let mut todo = vec![(PathBuf::from("src"), Module::new())];
    let mut found = Vec::new();
    while let Some((directory, module)) = todo.pop() {
        if directory != Path::new("src") {
            found.extend(circles(&directory, &module));
        }
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                todo.push((path.clone(), [&module[..], &[name]].concat()));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
    // Checks the path reader itself.
    let module = vec!["a".to_owned(), "b".to_owned()];
    let code = "use super::{c::D, e};\nuse crate::x::{self, y::{Z, w}};\nlet f = super::g::h(self::i);\n";
    let read: Vec<String> = paths(code, &module).iter().map(|path| path.join("/")).collect();
    assert_eq!(read, ["a/b/i", "a/c/D", "a/e", "a/g/h", "x", "x/y/Z", "x/y/w"]);
}
