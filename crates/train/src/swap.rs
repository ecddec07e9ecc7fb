//! New folders in the place of old ones, so that a kill at any point loses neither.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::export::{FUSED, LORA_MODEL, io as failed};

/// Where an export is written.
const NEW: &str = ".new";
/// Where what it replaces waits until it is there.
const OLD: &str = ".old";

/// Writes a file below the folder of an export, on the disk when this returns.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file = File::create(path)?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    };
    write().map_err(failed(path))
}

/// Clears away what a killed export left, after putting back what it had moved aside; the folder in
/// which the next one is written.
pub(crate) fn recover(folder: &Path) -> Result<PathBuf> {
    let (new, old) = (folder.join(NEW), folder.join(OLD));
    for name in [LORA_MODEL, FUSED] {
        let (from, to) = (old.join(name), folder.join(name));
        if from.exists() && !to.exists() {
            run(&Step::Rename(from, to))?;
        }
    }
    for left in [&new, &old] {
        run(&Step::Remove(left.clone()))?;
    }
    Ok(new)
}

/// Takes back what an export wrote that will not be.
pub(crate) fn discard(new: &Path) -> Result<()> {
    run(&Step::Remove(new.to_owned()))
}

/// Puts the folders of an export in the place of earlier ones.
pub(crate) fn swap(folder: &Path) -> Result<()> {
    steps(folder).iter().try_for_each(run)
}

#[derive(Debug)]
enum Step {
    Make(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

/// Each old folder goes aside and its successor takes its place; only then are the old ones deleted.
fn steps(folder: &Path) -> Vec<Step> {
    let (new, old) = (folder.join(NEW), folder.join(OLD));
    let mut steps = vec![Step::Make(old.clone())];
    for name in [LORA_MODEL, FUSED] {
        let place = folder.join(name);
        if place.exists() {
            steps.push(Step::Rename(place.clone(), old.join(name)));
        }
        if new.join(name).exists() {
            steps.push(Step::Rename(new.join(name), place));
        }
    }
    steps.extend([Step::Remove(old), Step::Remove(new)]);
    steps
}

fn run(step: &Step) -> Result<()> {
    let (path, done) = match step {
        Step::Make(path) => (path, fs::create_dir_all(path)),
        Step::Rename(from, to) => (to, fs::rename(from, to)),
        Step::Remove(path) if path.exists() => (path, fs::remove_dir_all(path)),
        Step::Remove(path) => (path, Ok(())),
    };
    done.and_then(|()| sync_folder(path.parent()))
        .map_err(failed(path))
}

/// A rename is on the disk once its folder is.
fn sync_folder(folder: Option<&Path>) -> io::Result<()> {
    match folder.filter(|folder| cfg!(unix) && folder.exists()) {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, what: &str) {
        for name in [LORA_MODEL, FUSED] {
            write_synced(&folder.join(name).join("file"), what.as_bytes()).expect("written");
        }
    }

    fn read(folder: &Path, name: &str) -> String {
        fs::read_to_string(folder.join(name).join("file")).expect(name)
    }

    /// Killed after any step, there is a whole folder of each name, at once or when the next export
    /// begins; and that one ends as if nothing had been.
    #[test]
    fn killed_between_any_two_steps_nothing_is_lost() {
        let num_steps = {
            let folder = tempfile::tempdir().expect("a folder");
            write(folder.path(), "old");
            write(&folder.path().join(NEW), "new");
            steps(folder.path()).len()
        };
        assert_eq!(num_steps, 7);
        for killed_after in 0..=num_steps {
            let folder = tempfile::tempdir().expect("a folder");
            let folder = folder.path();
            write(folder, "old");
            write(&folder.join(NEW), "new");
            for step in &steps(folder)[..killed_after] {
                run(step).expect("a step");
            }
            let new = recover(folder).expect("recovered");
            for name in [LORA_MODEL, FUSED] {
                let found = read(folder, name);
                assert!(["old", "new"].contains(&&*found), "{killed_after}: {found}");
            }
            write(&new, "newer");
            swap(folder).expect("swapped");
            for name in [LORA_MODEL, FUSED] {
                assert_eq!(read(folder, name), "newer");
            }
            assert_eq!(fs::read_dir(folder).expect("there").count(), 2);
        }
    }
}
