package conformance

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// entry is one member of a layer's archive.
type entry struct {
	name string
	kind byte // tar type flag; 0 is a file
	body string
	mode int64
	uid  int
	link string
	pax  map[string]string
}

// archive writes a layer; the same entries always give the same bytes.
func archive(t testing.TB, entries []entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Typeflag: e.kind, Mode: e.mode, Uid: e.uid, Gid: e.uid + 1, Size: int64(len(e.body)),
			Linkname: e.link, PAXRecords: e.pax, ModTime: time.Unix(1700000000, 0), Format: tar.FormatPAX,
		}
		switch {
		case e.kind == 0:
			h.Typeflag = tar.TypeReg
		case e.kind == tar.TypeChar || e.kind == tar.TypeBlock:
			h.Devmajor, h.Devminor = 1, 3
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if e.kind == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		must(t, w.WriteHeader(h))
		_, err := w.Write([]byte(e.body))
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

const (
	deep    = "usr/share/a/rather/deep/path"
	unicode = "etc/\u00fcml\u00e4ut \U0001f680"
)

// imageLayers go through what layers may contain, whiteouts first of all.
var imageLayers = [][]entry{
	{
		{name: "etc/", kind: tar.TypeDir}, {name: "etc/keep", body: "keep"}, {name: "etc/drop", body: "drop"}, {name: "etc/change", body: "old"},
		{name: "opaque/", kind: tar.TypeDir}, {name: "opaque/old", body: "old"}, {name: "opaque/sub/", kind: tar.TypeDir}, {name: "opaque/sub/old", body: "old"},
		{name: "gone/", kind: tar.TypeDir}, {name: "gone/file", body: "x"}, {name: "gone/dir/", kind: tar.TypeDir}, {name: "gone/dir/file", body: "x"},
		{name: "becomes-file/", kind: tar.TypeDir}, {name: "becomes-file/inner", body: "x"}, {name: "becomes-dir", body: "x"},
		{name: "bin/su", body: "setuid", mode: 0o4755}, {name: "tmp/", kind: tar.TypeDir, mode: 0o1777},
		{name: "hard/a", body: strings.Repeat("linked", 1000)}, {name: "hard/b", kind: tar.TypeLink, link: "hard/a"}, {name: "hard/c", kind: tar.TypeLink, link: "hard/b"},
	},
	{
		{name: "etc/.wh.drop"}, {name: "etc/change", body: "new", uid: 1000}, {name: "etc/link", kind: tar.TypeSymlink, link: "keep", mode: 0o777},
		{name: "opaque/.wh..wh..opq"}, {name: "opaque/new", body: "new"},
		{name: ".wh.gone"}, {name: ".wh.becomes-file"}, {name: "becomes-file", body: "file"}, {name: "becomes-dir/", kind: tar.TypeDir}, {name: "becomes-dir/inner", body: "in"},
		{name: "dev/null", kind: tar.TypeChar, mode: 0o666}, {name: "run/fifo", kind: tar.TypeFifo, mode: 0o600},
		{name: unicode, body: "unicode"}, {name: deep + "/" + strings.Repeat("n", 200), body: "long"},
	},
	{ // nothing but removals, of things from both layers below
		{name: "hard/.wh.a"}, {name: "opaque/.wh.new"}, {name: "usr/share/.wh.a"}, {name: "etc/.wh.keep"}, {name: "etc/.wh.link"},
	},
	{
		{name: "gone/", kind: tar.TypeDir, mode: 0o700}, {name: "gone/again", body: "again"}, {name: "etc/drop", body: "back"}, {name: "opaque/", kind: tar.TypeDir, mode: 0o711, uid: 7},
		{name: "bin/ping", body: "caps", mode: 0o755, pax: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "SCHILY.xattr.user.note": "kept"}},
	},
	{}, // an empty layer
	{{name: "opaque/.wh..wh..opq"}, {name: "opaque/last", body: "last"}, {name: "becomes-dir/.wh.inner"}},
}

// image is what a registry would have sent.
type image struct {
	manifest ocispec.Descriptor
	chain    []digest.Digest
	layers   []ocispec.Descriptor
}

// put writes one blob.
func put(t testing.TB, ctx context.Context, cs content.Store, kind string, data []byte) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(data), Size: int64(len(data))}
	must(t, content.WriteBlob(ctx, cs, desc.Digest.String(), bytes.NewReader(data), desc))
	return desc
}

// store writes the image's blobs; the layers numbered in absent stay away, as
// when nothing ever had to fetch them.
func store(t testing.TB, ctx context.Context, cs content.Store, absent ...int) image {
	t.Helper()
	var img image
	config := ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers"}}
	for i, entries := range imageLayers {
		plain := archive(t, entries)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(plain))
		var buf bytes.Buffer
		z := gzip.NewWriter(&buf)
		_, err := z.Write(plain)
		must(t, err)
		must(t, z.Close())
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(buf.Bytes()), Size: int64(buf.Len())}
		if !slices.Contains(absent, i) {
			put(t, ctx, cs, desc.MediaType, buf.Bytes())
		}
		img.layers = append(img.layers, desc)
	}
	img.chain = identity.ChainIDs(append([]digest.Digest{}, config.RootFS.DiffIDs...))
	data, err := json.Marshal(config)
	must(t, err)
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: put(t, ctx, cs, ocispec.MediaTypeImageConfig, data), Layers: img.layers,
	}
	data, err = json.Marshal(manifest)
	must(t, err)
	img.manifest = put(t, ctx, cs, ocispec.MediaTypeImageManifest, data)
	return img
}

// unpackImage is the part of a pull that comes after the download.
func unpackImage(t testing.TB, ctx context.Context, m *metadataLayer, as string, img image, parallel bool) {
	t.Helper()
	p := unpack.Platform{
		Platform: platforms.Default(), SnapshotterKey: as, Snapshotter: m.sn, Applier: apply.NewFileSystemApplier(m.cs),
	}
	var opts []unpack.UnpackerOpt
	if parallel {
		p.SnapshotterCapabilities = []string{snapshots.RebaseCap}
		opts = append(opts, unpack.WithUnpackLimiter(semaphore.NewWeighted(3)))
	}
	u, err := unpack.NewUnpacker(ctx, m.cs, append(opts, unpack.WithUnpackPlatform(p))...)
	must(t, err)
	must(t, images.Dispatch(ctx, u.Unpack(images.ChildrenHandler(m.cs)), nil, img.manifest))
	r, err := u.Wait()
	must(t, err)
	if r.Unpacks != 1 {
		t.Errorf("%d images unpacked", r.Unpacks)
	}
}

// leased keeps what a pull makes from the collector, as clients do.
func leased(t testing.TB, m *metadataLayer, n string) (context.Context, func()) {
	t.Helper()
	lm := metadata.NewLeaseManager(m.db)
	l, err := lm.Create(ns(n), leases.WithRandomID())
	must(t, err)
	return leases.WithLease(ns(n), l.ID), func() { must(t, lm.Delete(ns(n), l)) }
}

// TestUnpack pulls an image through containerd's unpacker, metadata layer and
// applier, one layer after the other and all at once, and compares the result
// with the same image on the built-in snapshotter.
func TestUnpack(t *testing.T) {
	needRoot(t)
	t.Parallel()
	// Per mode: without its parent, a layer cannot take the attributes of
	// directories that it does not name. By the name "overlayfs", the unpacker
	// turns the built-in snapshotter's bind mounts into what a parentless layer needs.
	var img image
	want := map[bool][][]string{}
	for _, parallel := range []bool{false, true} {
		reference := newMetadataLayer(t, builtin(t))
		ctx, _ := leased(t, reference, "test")
		img = store(t, ctx, reference.cs)
		unpackImage(t, ctx, reference, "overlayfs", img, parallel)
		for _, id := range img.chain {
			want[parallel] = append(want[parallel], look(t, ctx, reference.sn, id.String()))
		}
	}

	for _, c := range []struct {
		what     string
		parallel bool
		known    int // so many layers from the bottom are in the daemon's store
	}{
		{"Sequential", false, 0},
		{"Parallel", true, 0},
		{"OneKnown", false, 1},
	} {
		t.Run(c.what, func(t *testing.T) {
			known := map[string]map[string]string{}
			absent := []int{}
			for i := range c.known {
				known[img.chain[i].String()] = map[string]string{"etc/keep": "keep", "etc/known": fmt.Sprint(i)}
				absent = append(absent, i)
			}
			s := serve(t, layers(t, known))
			m := newMetadataLayer(t, s.snapshotter())
			ctx, release := leased(t, m, "test")
			img := store(t, ctx, m.cs, absent...)
			unpackImage(t, ctx, m, name, img, c.parallel)
			parent := ""
			for i, id := range img.chain {
				info, err := m.sn.Stat(ctx, id.String())
				must(t, err)
				if info.Parent != parent || info.Kind != snapshots.KindCommitted {
					t.Errorf("layer %d: %+v", i, info)
				}
				parent = id.String()
				if c.known == 0 {
					wantLines(t, fmt.Sprintf("layer %d", i), look(t, ctx, m.sn, id.String()), want[c.parallel][i])
				}
			}
			m.collect(t) // the views that were looked at
			if got := len(s.names(t)); got != len(img.chain) {
				t.Errorf("%d snapshots for %d layers", got, len(img.chain))
			}
			unpackImage(t, ctx, m, name, img, c.parallel) // a second pull finds everything

			// The container on top: what was removed is gone, what was made is there.
			mounts, err := m.sn.Prepare(ctx, "container", parent)
			must(t, err)
			mounted(t, mounts, func(dir string) {
				for _, gone := range []string{"etc/keep", "etc/link", "opaque/old", "opaque/sub", "opaque/new", "gone/file", "gone/dir", "hard/a", "usr/share/a", "becomes-dir/inner"} {
					if _, err := os.Lstat(dir + "/" + gone); !os.IsNotExist(err) {
						t.Errorf("%s should be gone: %v", gone, err)
					}
				}
				for path, text := range map[string]string{"etc/drop": "back", "etc/change": "new", "opaque/last": "last", "gone/again": "again", unicode: "unicode", "becomes-file": "file"} {
					wantFile(t, dir+"/"+path, text)
				}
				if c.known > 0 {
					wantFile(t, dir+"/etc/known", "0")
				}
			})
			must(t, m.sn.Remove(ctx, "container"))
			release()
			m.collect(t)
			s.wantNames(t)
			s.wantConsistent(t)
		})
	}
}
