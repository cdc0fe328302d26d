"""Which nodes of the open workflow lie over one another, as the page draws them, by their titles."""

OVERLAPS = """() => {
    const { scale } = app.canvas.ds;
    const badge = 20; // px: the pack's name, which the classic canvas draws above a node
    const shown = app.graph.nodes.map(n => {
        const element = document.querySelector(`[data-node-id="${n.id}"]`);
        if (!element) {
            const [x, y, width, height] = n.boundingRect;
            const above = n.type.startsWith("EVDiT") ? badge : 0;
            return [n.title, x, y - above, width, height + above];
        }
        const { x, y, width, height } = element.getBoundingClientRect();
        return [n.title, x / scale, y / scale, width / scale, height / scale];
    });
    const px = 0.5; // positions come back from the screen, rounded: nodes that touch do not lie over one another
    const over = ([, ax, ay, aw, ah], [, bx, by, bw, bh]) =>
        ax + px < bx + bw && bx + px < ax + aw && ay + px < by + bh && by + px < ay + ah;
    return shown.flatMap((a, i) => shown.slice(i + 1).filter(b => over(a, b)).map(b => [a[0], b[0]]));
}"""
