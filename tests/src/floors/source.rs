//! Parses the modules of a crate, and the paths that each mentions.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Index;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Ident, Spacing, Span, TokenStream, TokenTree};
use syn::punctuated::Punctuated;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, Meta, Token, UseTree, Visibility};

use super::Read;

/// A module: a file or an inline module.
#[derive(Default)]
pub(super) struct Module {
    /// The path from the crate root. The root's is empty.
    pub(super) path: Vec<String>,
    pub(super) file: PathBuf,
    pub(super) parent: Option<usize>,
    /// The module of the file that contains it. For a file's module this is the module itself.
    pub(super) home: usize,
    pub(super) children: BTreeMap<String, usize>,
    pub(super) items: BTreeSet<String>,
    pub(super) macros: BTreeSet<String>,
    pub(super) imports: Vec<Import>,
    /// The paths of imports that end in `*`.
    pub(super) globs: Vec<Vec<String>>,
    pub(super) mentions: Vec<Mention>,
    /// The folder of its child modules' files.
    folder: PathBuf,
}

/// A name that a `use` imports.
pub(super) struct Import {
    pub(super) name: String,
    pub(super) path: Vec<String>,
    /// It is a re-export.
    pub(super) is_public: bool,
}

/// A path in the code.
pub(super) struct Mention {
    pub(super) path: Vec<String>,
    pub(super) line: usize,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Import,
    Glob,
    Path,
    Macro,
}

/// The modules of a crate, without test modules.
pub(super) struct Crate(Vec<Module>);

impl Crate {
    pub(super) const ROOT: usize = 0;

    /// Parses the crate with this root file.
    pub(super) fn read(root: &Path, read: Read<'_>) -> Result<Self, String> {
        let folder = root.parent().unwrap_or(Path::new("")).to_path_buf();
        let module = Module { file: root.into(), folder, ..Module::default() };
        let mut reader = Reader { modules: vec![module], module: Self::ROOT, read, error: None };
        reader.file();
        reader.error.map_or(Ok(Self(reader.modules)), Err)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Module)> {
        self.0.iter().enumerate()
    }

    /// Returns the modules that are files.
    pub(super) fn files(&self) -> impl Iterator<Item = usize> {
        self.iter().filter(|(index, module)| *index == module.home).map(|(index, _)| index)
    }

    /// Returns a module's name for messages.
    pub(super) fn name(&self, module: usize) -> String {
        if module == Self::ROOT { "the crate root".into() } else { format!("`{}`", self[module].path.join("::")) }
    }
}

impl Index<usize> for Crate {
    type Output = Module;

    fn index(&self, module: usize) -> &Module {
        &self.0[module]
    }
}

struct Reader<'a> {
    modules: Vec<Module>,
    /// The module whose code is being visited.
    module: usize,
    read: Read<'a>,
    /// The first error.
    error: Option<String>,
}

impl Reader<'_> {
    /// Visits the current module's file.
    fn file(&mut self) {
        let file = self.modules[self.module].file.clone();
        let text = (self.read)(&file).map_err(|error| format!("{}: cannot read it: {error}", file.display()));
        let parsed = text.and_then(|text| {
            let place = |error: &syn::Error| format!("{}:{}", file.display(), error.span().start().line);
            syn::parse_file(&text).map_err(|error| format!("{}: cannot parse it: {error}", place(&error)))
        });
        match parsed {
            Ok(parsed) => self.visit_file(&parsed),
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    fn scope(&mut self) -> &mut Module {
        &mut self.modules[self.module]
    }

    fn mention(&mut self, path: Vec<String>, span: Span, kind: Kind) {
        self.scope().mentions.push(Mention { path, line: span.start().line, kind });
    }

    fn path(&mut self, path: &syn::Path, kind: Kind) {
        // A path with leading colons names an item of another crate.
        if path.leading_colon.is_none() {
            let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.mention(names, path.segments[0].ident.span(), kind);
        }
    }

    /// Visits a child module.
    fn child(&mut self, item: &ItemMod) {
        let name = item.ident.to_string();
        if name == "tests" && item.content.is_some() {
            return;
        }
        let (parent, index) = (self.module, self.modules.len());
        let Module { path, file, home, folder, .. } = &self.modules[parent];
        let path = [path.as_slice(), std::slice::from_ref(&name)].concat();
        let inner = folder.join(&name);
        let (file, home) = if item.content.is_some() {
            (file.clone(), *home)
        } else {
            let flat = folder.join(format!("{name}.rs"));
            (if (self.read)(&flat).is_ok() { flat } else { inner.join("mod.rs") }, index)
        };
        self.modules.push(Module { path, file, parent: Some(parent), home, folder: inner, ..Module::default() });
        self.module = index;
        self.modules[parent].children.insert(name, index);
        match &item.content {
            Some((_, items)) => items.iter().for_each(|item| self.visit_item(item)),
            None => self.file(),
        }
        self.module = parent;
    }

    /// Records the names that a `use` imports.
    fn import(&mut self, tree: &UseTree, path: &[String], is_public: bool) {
        let with = |ident: &Ident| [path, &[ident.to_string()]].concat();
        let (ident, name) = match tree {
            UseTree::Path(inner) => return self.import(&inner.tree, &with(&inner.ident), is_public),
            UseTree::Group(group) => return group.items.iter().for_each(|tree| self.import(tree, path, is_public)),
            UseTree::Glob(glob) => {
                self.scope().globs.push(path.to_vec());
                if !is_public {
                    self.mention(path.to_vec(), glob.star_token.spans[0], Kind::Glob);
                }
                return;
            }
            UseTree::Name(name) => (&name.ident, &name.ident),
            UseTree::Rename(rename) => (&rename.ident, &rename.rename),
        };
        let path = if ident == "self" { path.to_vec() } else { with(ident) };
        let name = if name == "self" { path.last().cloned().unwrap_or_default() } else { name.to_string() };
        if !is_public {
            self.mention(path.clone(), ident.span(), Kind::Import);
        }
        self.scope().imports.push(Import { name, path, is_public });
    }

    /// Records the paths in tokens that `syn` does not parse: in macros, in attributes, and in unknown syntax. `prefix`
    /// is the path before the braces of an import.
    fn scan(&mut self, tokens: TokenStream, prefix: &[String]) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            match token {
                TokenTree::Group(group) => self.scan(group.stream(), &[]),
                TokenTree::Ident(ident) if begins_path(&tokens[..at - 1], ident) => {
                    let mut path = [prefix, &[ident.to_string()]].concat();
                    while ends_with_colons(&tokens[..tokens.len().min(at + 2)]) {
                        match tokens.get(at + 2) {
                            Some(TokenTree::Ident(next)) => path.push(next.to_string()),
                            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                                self.scan(group.stream(), &path);
                                path.clear();
                            }
                            _ => break,
                        }
                        at += 3;
                    }
                    let is_macro = matches!(tokens.get(at), Some(TokenTree::Punct(next)) if next.as_char() == '!');
                    if !path.is_empty() {
                        self.mention(path, ident.span(), if is_macro { Kind::Macro } else { Kind::Path });
                    }
                }
                _ => {}
            }
        }
    }
}

/// Returns whether the tokens end with `::`.
fn ends_with_colons(tokens: &[TokenTree]) -> bool {
    matches!(tokens, [.., TokenTree::Punct(first), TokenTree::Punct(second)]
        if first.as_char() == ':' && first.spacing() == Spacing::Joint && second.as_char() == ':')
}

/// Returns whether a path begins with this identifier. It does not for a field, a method, a lifetime or a macro
/// variable, or inside a longer path.
fn begins_path(before: &[TokenTree], ident: &Ident) -> bool {
    let is = |token: &TokenTree, character| matches!(token, TokenTree::Punct(punct) if punct.as_char() == character);
    match before {
        // A range.
        [.., first, second] if is(first, '.') && is(second, '.') => true,
        [.., last] if is(last, '$') => ident == "crate",
        [.., last] => !is(last, '.') && !is(last, '\'') && !ends_with_colons(before),
        [] => true,
    }
}

/// Defines visitor methods that skip test code.
macro_rules! leave_tests_out {
    ($($visit:ident: $node:ident),*) => {
        $(fn $visit(&mut self, node: &'ast syn::$node) {
            if !is_test(&node.attrs) {
                visit::$visit(self, node);
            }
        })*
    };
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attributes, name) = parts(item);
        if is_test(attributes) {
            return;
        }
        self.scope().items.extend(name.map(Ident::to_string));
        match item {
            Item::Mod(item) => self.child(item),
            _ => visit::visit_item(self, item),
        }
    }

    leave_tests_out! {
        visit_foreign_item_fn: ForeignItemFn, visit_impl_item_fn: ImplItemFn, visit_impl_item_const: ImplItemConst,
        visit_local: Local, visit_stmt_macro: StmtMacro, visit_expr_block: ExprBlock, visit_expr_call: ExprCall,
        visit_arm: Arm, visit_field: Field, visit_field_value: FieldValue, visit_variant: Variant
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.leading_colon.is_none() {
            self.import(&item.tree, &[], !matches!(item.vis, Visibility::Inherited));
        }
    }

    fn visit_item_macro(&mut self, item: &'ast syn::ItemMacro) {
        if let Some(name) = item.ident.as_ref().map(Ident::to_string) {
            if item.attrs.iter().any(|attribute| attribute.path().is_ident("macro_export")) {
                // An exported macro is at the crate root as well.
                let path = ["crate"].map(String::from).into_iter().chain(self.scope().path.clone());
                let path = path.chain([name.clone()]).collect();
                self.modules[Crate::ROOT].imports.push(Import { name: name.clone(), path, is_public: true });
            }
            self.scope().macros.insert(name);
        }
        visit::visit_item_macro(self, item);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.path(path, Kind::Path);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, node: &'ast syn::Macro) {
        self.path(&node.path, Kind::Macro);
        visit::visit_macro(self, node);
    }

    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        self.scan(tokens.clone(), &[]);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if !attribute.path().is_ident("doc") {
            visit::visit_attribute(self, attribute);
        }
    }

    // The path in `pub(in crate::keys)` is not a use.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

/// Returns an item's attributes and its name.
fn parts(item: &Item) -> (&[Attribute], Option<&Ident>) {
    match item {
        Item::Const(item) => (&item.attrs, Some(&item.ident)),
        Item::Enum(item) => (&item.attrs, Some(&item.ident)),
        Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
        Item::ForeignMod(item) => (&item.attrs, None),
        Item::Impl(item) => (&item.attrs, None),
        Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
        // A module is a child, not an item.
        Item::Mod(item) => (&item.attrs, None),
        Item::Static(item) => (&item.attrs, Some(&item.ident)),
        Item::Struct(item) => (&item.attrs, Some(&item.ident)),
        Item::Trait(item) => (&item.attrs, Some(&item.ident)),
        Item::TraitAlias(item) => (&item.attrs, Some(&item.ident)),
        Item::Type(item) => (&item.attrs, Some(&item.ident)),
        Item::Union(item) => (&item.attrs, Some(&item.ident)),
        Item::Use(item) => (&item.attrs, None),
        _ => (&[], None),
    }
}

/// Returns whether these attributes limit their item to tests.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let is_cfg = attribute.path().is_ident("cfg");
        attribute.path().is_ident("test") || is_cfg && attribute.parse_args().is_ok_and(|meta| needs_test(&meta))
    })
}

/// Returns whether a `cfg` predicate holds only in tests.
fn needs_test(predicate: &Meta) -> bool {
    let Meta::List(list) = predicate else { return predicate.path().is_ident("test") };
    let inner = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated).unwrap_or_default();
    list.path.is_ident("all") && inner.iter().any(needs_test)
        || list.path.is_ident("any") && !inner.is_empty() && inner.iter().all(needs_test)
}
