//! Resolves paths to the modules that define them.

use super::source::{Crate, Kind};

/// What a path names: a module, or an item in this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Module(usize),
    Item(usize),
}

/// One module's use of another.
#[derive(Debug)]
pub(super) struct Dependency {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) line: usize,
    /// The path as written.
    pub(super) path: String,
    /// The path names the module itself, not an item in it.
    pub(super) is_module: bool,
}

/// Returns the uses between modules, in source order.
pub(super) fn dependencies(modules: &Crate) -> Vec<Dependency> {
    let mut dependencies = Vec::new();
    for (module, scope) in modules.iter() {
        for mention in &scope.mentions {
            let is_private = || !scope.imports.iter().any(|import| import.is_public && import.name == mention.path[0]);
            let targets = match mention.kind {
                // The `use` of this name has been counted, unless it is a re-export.
                Kind::Path if mention.path.len() == 1 && is_private() => continue,
                Kind::Macro if mention.path.len() == 1 => modules.textual_macro(module, &mention.path[0]),
                _ => modules.resolve(module, &mention.path, &mut Vec::new()),
            };
            for target in targets {
                let (Target::Module(to) | Target::Item(to)) = target;
                let (from, to) = (scope.home, modules[to].home);
                if from != to {
                    let is_module = matches!(target, Target::Module(_)) && mention.kind != Kind::Glob;
                    let path = mention.path.join("::");
                    dependencies.push(Dependency { from, to, line: mention.line, path, is_module });
                }
            }
        }
    }
    dependencies
}

/// The names being looked up, to detect circular re-exports.
type Pending = Vec<(usize, String)>;

impl Crate {
    /// Resolves a path as seen from a module. Returns nothing if the path begins with another crate's name. Returns
    /// several targets if a module, a macro and a function share the name.
    fn resolve(&self, from: usize, path: &[String], pending: &mut Pending) -> Vec<Target> {
        let parent = |module: usize| vec![Target::Module(self[module].parent.unwrap_or(Self::ROOT))];
        let mut targets = match path[0].as_str() {
            "crate" => vec![Target::Module(Self::ROOT)],
            "self" => vec![Target::Module(from)],
            "super" => parent(from),
            name => self.lookup(from, name, pending).unwrap_or_default(),
        };
        for segment in &path[1..] {
            let step = |target| match (target, segment.as_str()) {
                (Target::Item(_), _) | (_, "self") => vec![target],
                (Target::Module(module), "super") => parent(module),
                // A name that is not found must come from a macro in the module.
                (Target::Module(module), name) => {
                    self.lookup(module, name, pending).unwrap_or_else(|| vec![Target::Item(module)])
                }
            };
            targets = targets.into_iter().flat_map(step).collect();
        }
        targets
    }

    /// Looks up a name in a module.
    fn lookup(&self, module: usize, name: &str, pending: &mut Pending) -> Option<Vec<Target>> {
        let this = (module, name.to_string());
        if pending.contains(&this) {
            return None;
        }
        pending.push(this);
        let scope = &self[module];
        let child = scope.children.get(name).map(|&child| vec![Target::Module(child)]);
        let item = scope.items.contains(name).then(|| vec![Target::Item(module)]);
        let mut found: Vec<_> = child.into_iter().chain(item).collect();
        for import in scope.imports.iter().filter(|import| import.name == name) {
            let targets = self.resolve(module, &import.path, pending);
            // Without a target it is a name of another crate.
            found.push(if targets.is_empty() { vec![Target::Item(module)] } else { targets });
        }
        if found.is_empty() {
            for glob in &scope.globs {
                for target in self.resolve(module, glob, pending) {
                    let Target::Module(from) = target else { continue };
                    found.extend(self.lookup(from, name, pending));
                }
            }
        }
        pending.pop();
        if found.is_empty() { None } else { Some(found.concat()) }
    }

    /// Finds a macro by its bare name, in the module or in an enclosing one.
    fn textual_macro(&self, module: usize, name: &str) -> Vec<Target> {
        if let Some(found) = self.lookup(module, name, &mut Vec::new()) {
            return found;
        }
        let around = std::iter::successors(self[module].parent, |&module| self[module].parent);
        around.filter(|&module| self[module].macros.contains(name)).take(1).map(Target::Item).collect()
    }
}
