//! Garbage: what lies in a stage name's folders and no manifest lists.

use std::collections::BTreeMap;

use crate::finished::read_manifest;
use crate::layout::{MANIFEST, is_key16};
use crate::{ObjectInfo, Result, StageId, Store};

/// Every object under a stage name that no manifest lists: journals, leftovers of killed
/// tries, and all of the stages that are still open, so delete only when none is running.
///
/// In a local folder this holds the files `name#1` too that a killed write leaves and that no
/// listing shows; [`Store::delete`] removes them like any other.
///
/// # Errors
/// Those of listing and of reading manifests.
pub async fn garbage(store: &Store, id: &StageId) -> Result<Vec<ObjectInfo>> {
    let prefix = format!("{id}/");
    let folder_of = |path: &str| {
        let (folder, _) = path.strip_prefix(&prefix)?.split_once('/')?;
        is_key16(folder).then(|| folder.to_owned())
    };
    let mut folders: BTreeMap<String, Vec<ObjectInfo>> = BTreeMap::new();
    for object in store.list(&id.to_string()).await? {
        if let Some(key16) = folder_of(&object.path) {
            folders.entry(key16).or_default().push(object);
        }
    }
    let mut garbage = Vec::new();
    for (key16, objects) in folders {
        let manifest = read_manifest(store, id, &key16)
            .await?
            .map(|(_, manifest)| manifest);
        let folder = format!("{prefix}{key16}/");
        garbage.extend(objects.into_iter().filter(|object| {
            let name = object.path.strip_prefix(&folder).unwrap_or(&object.path);
            !manifest
                .as_ref()
                .is_some_and(|manifest| name == MANIFEST || manifest.object(name).is_some())
        }));
    }
    // Of this name: in one of its stages, or beside current.json; not of a name below it.
    let own = |object: &ObjectInfo| {
        let rest = object.path.strip_prefix(&prefix);
        folder_of(&object.path).is_some() || rest.is_some_and(|rest| !rest.contains('/'))
    };
    garbage.extend(
        store
            .staged_files(&id.to_string())
            .await?
            .into_iter()
            .filter(own),
    );
    garbage.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(garbage)
}
