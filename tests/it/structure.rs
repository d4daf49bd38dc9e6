//! The module table of the crate documentation is true.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module -> level, from the table in src/lib.rs.
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

/// Modules named as `crate::MODULE` in code, outside comments.
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
        if module == "lib" || module == "main" {
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
